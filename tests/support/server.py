"""A running server for the tests of its clients: `hires serve` in a process of its own, on a free port."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forked import Command

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

ROOT = Path(__file__).parents[2]
STARTED: list[Live] = []


class Live:
    """A server process: `url`, `folder`, and `stop` or `kill -9`. bare: in an interpreter that has imported nothing before."""

    process: Command | subprocess.Popen[bytes]

    def __init__(self, folder: Path, *options: str, bare: bool = False) -> None:
        self.folder = folder
        self.log = folder.parent / f"{folder.name}.log"
        command = ["serve", "--port", "0", "--folder", str(folder), "--vram", "2GB", *options]
        if bare:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "hires", *command], stdout=subprocess.PIPE, stderr=log, cwd=ROOT
                )
        else:
            self.process = Command(*command, stderr=self.log, environment={"OMP_NUM_THREADS": "1"})
        STARTED.append(self)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        found = re.search(r"http://\S+?(?=/ )", line)
        assert found, (line, self.log.read_text())
        self.url = found[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def resident_bytes(self) -> int:
        return self._memory("VmRSS")

    @property
    def peak_bytes(self) -> int:
        return self._memory("VmHWM")

    def _memory(self, name: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith(name)))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture(autouse=True)
def no_server_is_left() -> Iterator[None]:
    """A test that fails leaves no server at work."""
    before = len(STARTED)
    yield
    for live in STARTED[before:]:
        if live is not SHARED.get("server") and live.process.poll() is None:
            live.process.kill()


SHARED: dict[str, Live] = {}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all tests that only talk to it."""
    live = Live(tmp_path_factory.mktemp("server") / "jobs")
    SHARED["server"] = live
    yield live
    live.stop()
