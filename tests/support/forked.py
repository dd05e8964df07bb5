"""Commands in processes of their own that need not import PyTorch, diffusers and transformers again.

Python's fork server imports them once per test run; each command is a fork of it, seven seconds cheaper than an interpreter.
What a fresh interpreter does (which modules it loads, what libraries print) is tested with subprocess.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

IMPORTED = ("hires.cli.app", "hires.engine.engine", "hires.engine.run", "tests.support.checkpoints")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*IMPORTED])


class Command:
    """`hires ARGUMENTS` at work: `stdout` to read from, its pid, and what subprocess.Popen has to wait and to end it."""

    def __init__(
        self, *arguments: str, stderr: Path, stdin: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it. stderr: the file that it appends to. environment: variables to set beside this process's own."""
        ours, theirs = CONTEXT.Pipe(duplex=False)
        given = dict(os.environ) | dict(environment or {})
        self._process = CONTEXT.Process(
            target=carried_out, args=(arguments, theirs, str(stderr), str(stdin or os.devnull), given)
        )
        with one_thread():
            self._process.start()
        theirs.close()
        self._ours = ours
        self.stdout = os.fdopen(os.dup(ours.fileno()), "rb")
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """Its exit code, or minus the signal that ended it. TimeoutError where it is still at work."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} is still at work after {seconds} s")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*arguments: str, folder: Path, stdin: str = "", seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """`hires ARGUMENTS` to its end, as subprocess.run gives it. folder: an empty or a new one for what is typed and printed."""
    folder.mkdir(exist_ok=True)
    typed, errors = folder / "stdin", folder / "stderr"
    typed.write_text(stdin)
    errors.write_text("")
    command = Command(*arguments, stderr=errors, stdin=typed)
    with command.stdout:
        output = command.stdout.read().decode()
    return subprocess.CompletedProcess(arguments, command.wait(seconds), output, errors.read_text())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The fork server reads how many threads to use when it starts, with the first command."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before


def carried_out(
    arguments: tuple[str, ...], stdout: Connection, stderr: str, stdin: str, environment: Mapping[str, str]
) -> None:
    """In the new process: what `hires` on a command line does, its exit code included."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(stdin, os.O_RDONLY), 0)
    os.dup2(stdout.fileno(), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["hires", *arguments]
    from hires.cli.app import app

    try:
        app()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
