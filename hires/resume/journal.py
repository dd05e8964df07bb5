"""Keeps what an unfinished render has finished beside its output.

A folder `.NAME.hires` holds job.json (what is drawn, by which files and versions) and records: the prompts' conditions, and
per stage what it starts from, the estimate of every evaluation, and its latents; then rows of the picture. Samplers are
functions of their estimates, so a sampler that is given the recorded ones again stands where it stopped, bit for bit,
whatever state it keeps. Every file is written under another name, synced and renamed, and carries the digest of what it
holds; one that is torn is not there.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from hires.errors import HiresError, RequestError, WriteError
from hires.protocols import Denoiser
from hires.resume.records import (
    LOCK,
    PART,
    digest,
    hold,
    packed,
    read_whole,
    record,
    refused,
    sync_folder,
    tensors,
    unpacked,
    write_whole,
)
from hires.sampling.conditioning import Conditioning
from hires.units import Json

if TYPE_CHECKING:
    from hires.images.boxes import Pixels

log = logging.getLogger(__name__)
SECONDS = 20.0  # between writes: what a kill loses at most
SUFFIX = ".hires"


class Journal(Protocol):
    """What a run asks of a journal; `NoJournal` remembers nothing."""

    def texts(self) -> list[Conditioning] | None:
        """The conditions of the prompts, if they are recorded."""
        ...

    def keep_texts(self, texts: Sequence[Conditioning]) -> None:
        """Record the conditions of the prompts."""
        ...

    def tensor(self, name: str) -> Tensor | None:
        """A recorded tensor by name, on the CPU; None where there is none."""
        ...

    def keep(self, name: str, value: Tensor) -> None:
        """Record a tensor under a name."""
        ...

    def recorded(self, stage: int, denoise: Denoiser, on_known: Callable[[], None]) -> Denoiser:
        """The denoiser, its estimates recorded; known ones are not evaluated but reported to `on_known`."""
        ...

    def finish_stage(self, stage: int, latents: Tensor) -> None:
        """Record a stage's final latents in place of its estimates."""
        ...

    def rows(self) -> Iterator[Pixels]:
        """Recorded rows (n, W, 3) of the picture, from the top, without a gap."""
        ...

    def keep_rows(self, first: int, rows: Pixels) -> None:
        """Record rows (n, W, 3) of the picture that begin at row `first`."""
        ...


class NoJournal:
    """A journal that records nothing."""

    def texts(self) -> list[Conditioning] | None:
        """None."""
        return None

    def keep_texts(self, texts: Sequence[Conditioning]) -> None:
        """Nothing is recorded."""
        pass

    def tensor(self, name: str) -> Tensor | None:
        """None."""
        return None

    def keep(self, name: str, value: Tensor) -> None:
        """Nothing is recorded."""
        pass

    def recorded(self, stage: int, denoise: Denoiser, on_known: Callable[[], None]) -> Denoiser:
        """The same denoiser."""
        return denoise

    def finish_stage(self, stage: int, latents: Tensor) -> None:
        """Nothing is recorded."""
        pass

    def rows(self) -> Iterator[Pixels]:
        """No rows."""
        return iter(())

    def keep_rows(self, first: int, rows: Pixels) -> None:
        """Nothing is recorded."""
        pass


NO_JOURNAL = NoJournal()


class Begun(NoJournal):
    """A journal in memory that has the first stage's latents and records nothing more.

    Args:
        latents: (1, C, h, w) float32 on the CPU.
    """

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents

    def tensor(self, name: str) -> Tensor | None:
        """The latents, where they are asked for."""
        return self._latents if name == "stage-0" else None


@dataclass
class FileJournal:
    """A journal in a folder. Records wait in memory for at most `seconds` before they are written."""

    folder: Path
    seconds: float = SECONDS
    clock: Callable[[], float] = time.monotonic
    _waiting: dict[str, bytes] = field(default_factory=dict)
    _written: float = field(default=float("-inf"))
    _lock: IO[str] | None = None
    _latents: Tensor = field(default_factory=lambda: torch.empty(0))  # the digest of those that rows are decoded from

    def texts(self) -> list[Conditioning] | None:
        """The conditions of the prompts, if they are recorded."""
        return unpacked(self._read("conditioning"))

    def keep_texts(self, texts: Sequence[Conditioning]) -> None:
        """Record the conditions of the prompts, on the disk at once."""
        self._write("conditioning", packed(texts), now=True)

    def tensor(self, name: str) -> Tensor | None:
        """A recorded tensor by name, on the CPU; None where there is none."""
        return tensors(self._read(name)).get("value")

    def keep(self, name: str, value: Tensor) -> None:
        """Record a tensor under a name."""
        self._write(name, record(value=value))

    def recorded(self, stage: int, denoise: Denoiser, on_known: Callable[[], None]) -> Denoiser:
        """The same denoiser: what it gave before the stop comes from the journal, what it gives now goes into it.

        `on_known` is called for each evaluation that was there.
        """
        calls = 0

        def estimate(x: Tensor, sigma: float, cond: object) -> Tensor:
            nonlocal calls
            name, calls = f"stage-{stage}-estimate-{calls:05d}", calls + 1
            before = self._estimate(name, sigma)
            if before is not None:
                on_known()
                return before.to(x.device)
            value = denoise(x, sigma, cond)
            self._write(name, record(value=value, sigma=_scalar(sigma)))
            return value

        return estimate

    def finish_stage(self, stage: int, latents: Tensor) -> None:
        """Keep a stage's latents, and nothing else of it once they are on the disk."""
        content = record(value=latents)
        self._latents = torch.frombuffer(bytearray(digest(content)), dtype=torch.uint8)
        self._waiting = {name: held for name, held in self._waiting.items() if not name.startswith(f"stage-{stage}-")}
        if self._write(f"stage-{stage}", content, now=True):
            for file in self.folder.glob(f"stage-{stage}-*"):
                file.unlink(missing_ok=True)

    def rows(self) -> Iterator[Pixels]:
        """Finished rows (n, W, 3) of the last stage's latents, from the top, without a gap."""
        first = 0
        while held := tensors(self._read(f"rows-{first:08d}")):
            if not torch.equal(held["of"], self._latents) or not len(held["value"]):
                return  # decoded from others, which were torn since and made again on another machine
            yield held["value"].numpy()
            first += len(held["value"])

    def keep_rows(self, first: int, rows: Pixels) -> None:
        """Record rows (n, W, 3) of the picture that begin at row `first`."""
        self._write(f"rows-{first:08d}", record(value=torch.from_numpy(np.ascontiguousarray(rows)), of=self._latents))

    def flush(self) -> bool:
        """Write what waits. Where the disk refuses, the render goes on and what is on it stays as it is: False."""
        try:
            for name, content in self._waiting.items():
                write_whole(self.folder / name, content)
            if self._waiting:
                sync_folder(self.folder)
        except WriteError as error:
            log.warning("%s; from here on nothing is written, and a later run would go on from before", error)
            self.seconds = float("inf")
        self._waiting, self._written = {}, self.clock()
        return self.seconds != float("inf")

    def remove(self) -> None:
        """The render is done: nothing stays."""
        self._waiting = {}
        if self._lock is not None or self.folder.exists():
            remove_folder(self.folder, self._lock or hold(self.folder))
        self._lock = None

    def lock(self) -> None:
        """Hold the job for this process. OutputError where another one works on it."""
        self._lock = hold(self.folder)

    def close(self) -> None:
        """The render ends unfinished: what waits is written, where the disk takes it."""
        self.flush()
        self.release()

    def release(self) -> None:
        """Let other processes work on the job."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _estimate(self, name: str, sigma: float) -> Tensor | None:
        held = tensors(self._read(name))
        return held.get("value") if torch.equal(held.get("sigma", torch.empty(0)), _scalar(sigma)) else None

    def _read(self, name: str) -> bytes | None:
        return self._waiting[name] if name in self._waiting else read_whole(self.folder / name)

    def _write(self, name: str, content: bytes, now: bool = False) -> bool:
        """Whether it is on the disk."""
        if self.seconds == float("inf"):
            return False
        self._waiting[name] = content
        return (now or self.clock() - self._written >= self.seconds) and self.flush()


def _scalar(sigma: float) -> Tensor:
    return torch.tensor([sigma], dtype=torch.float64)


def remove_folder(folder: Path, lock: IO[str]) -> bool:
    """The folder and all in it, the lock last, so that another process finds it held or gone; whether it is gone."""
    try:
        _empty(folder)
        if os.name == "nt":
            lock.close()  # an open file cannot be removed there
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)
    lock.close()
    return not folder.exists()


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name != LOCK:
            file.unlink(missing_ok=True)


def folder_of(output: Path) -> Path:
    """The folder of an output's journal, beside it."""
    return output.with_name(f".{output.name}{SUFFIX}")


def open_journal(
    output: Path, job: Json, *, resume: bool = False, restart: bool = False, seconds: float = SECONDS
) -> FileJournal:
    """The journal of a render of `job` to `output`: an unfinished one of the same job, else a new one.

    RequestError where `resume` finds nothing to go on from, or a job of another render is there (naming what differs) and
    `restart` was not given; OutputError where another process works on it or the folder is not one of ours.
    """
    folder = folder_of(output)
    before = folder.exists()
    if resume and not before:
        raise RequestError(f"resume: nothing unfinished is there for {output}; leave `resume` out to begin")
    journal = FileJournal(folder, seconds)
    journal.lock()
    try:
        _go_on_or_begin(output, folder, job, resume, restart)
    except OSError as error:
        journal.release()
        raise refused(folder, error) from error
    except HiresError:
        journal.release() if before else journal.remove()
        raise
    return journal


def _go_on_or_begin(output: Path, folder: Path, job: Json, resume: bool, restart: bool) -> None:
    before = None if restart else read_job(folder)
    if before is not None:
        _refuse_another(output, before, job)
        for file in folder.glob(f".*{PART}"):
            file.unlink(missing_ok=True)
        log.warning("going on with the unfinished render of %s", output)
        return
    if resume:
        raise RequestError(f"resume: what is there for {output} holds no job that can be trusted; leave `resume` out to begin")
    _empty(folder)
    write_whole(folder / "job.json", json.dumps(dict(job), sort_keys=True).encode())
    sync_folder(folder)


def check_unfinished(output: Path, asked: Mapping[str, object]) -> None:
    """RequestError where an unfinished render is there that another request began; asked: as `describe_request` gives it."""
    before = read_job(folder_of(output))
    if before is not None:
        _refuse_another(output, {name: before.get(name) for name in asked}, asked)


def _refuse_another(output: Path, before: Mapping[str, object], job: Mapping[str, object]) -> None:
    """RequestError that names what differs between an unfinished render and the one that is wanted."""
    if before.get("schema") != job.get("schema"):
        raise RequestError(
            f"output {output}: its unfinished render was begun by another version of hires, which draws otherwise; "
            "finish it with that version, give `restart` to throw it away, or give another output"
        )
    changed = differences(before, job)
    if changed:
        given = [name for name in changed if not name.startswith("plan.")]  # a plan follows from what was given
        raise RequestError(
            f"output {output}: an unfinished render is there that differs in {', '.join(given or changed)}; "
            "give that again to go on, `restart` to throw it away, or another output"
        )


def read_job(folder: Path) -> Json | None:
    """The job of a folder; None where there is none that can be trusted."""
    content = read_whole(folder / "job.json")
    if content is None:
        return None
    try:
        job = json.loads(content)
    except ValueError:
        return None
    return job if isinstance(job, dict) else None


def differences(before: object, now: object) -> list[str]:
    """The names of what is not the same in two jobs, those of nested values with a dot."""
    return _differences("", before, json.loads(json.dumps(now)))


def _differences(name: str, before: object, now: object) -> list[str]:
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        within = f"{name}." if name else ""
        names = [*before, *(key for key in now if key not in before)]
        return [difference for key in names for difference in _differences(f"{within}{key}", before.get(key), now.get(key))]
    return [] if before == now else [f"{name} ({_short(before)}, now {_short(now)})"]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
