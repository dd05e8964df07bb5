"""What an unfinished render has finished, next to its output: enough to go on after anything that stopped it.

A folder `.NAME.hires` holds job.json (what is drawn, by which files and versions) and records: the prompts' conditions, and
per stage what it starts from, the estimate of every evaluation, and its latents; then rows of the picture. Samplers are
functions of their estimates, so a sampler that is given the recorded ones again stands where it stopped, bit for bit,
whatever state it keeps. Every file is written under another name, synced and renamed, and carries the digest of what it
holds; one that is torn is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hires.conditioning import Conditioning
from hires.denoisers import Denoiser
from hires.errors import OutputError, RequestError, WriteError

log = logging.getLogger(__name__)
SECONDS = 20.0  # between writes: what a kill loses at most
DIGEST = 32


class Journal(Protocol):
    """What a run asks of a journal; `NoJournal` remembers nothing."""

    def texts(self) -> list[Conditioning] | None: ...
    def keep_texts(self, texts: Sequence[Conditioning]) -> None: ...
    def tensor(self, name: str) -> Tensor | None: ...
    def keep(self, name: str, value: Tensor) -> None: ...
    def recorded(self, stage: int, denoise: Denoiser) -> Denoiser: ...
    def finish_stage(self, stage: int, latents: Tensor) -> None: ...
    def rows(self) -> Iterator[NDArray[Any]]: ...
    def keep_rows(self, first: int, rows: NDArray[Any]) -> None: ...


class NoJournal:
    def texts(self) -> list[Conditioning] | None:
        return None

    def keep_texts(self, texts: Sequence[Conditioning]) -> None:
        pass

    def tensor(self, name: str) -> Tensor | None:
        return None

    def keep(self, name: str, value: Tensor) -> None:
        pass

    def recorded(self, stage: int, denoise: Denoiser) -> Denoiser:
        return denoise

    def finish_stage(self, stage: int, latents: Tensor) -> None:
        pass

    def rows(self) -> Iterator[NDArray[Any]]:
        return iter(())

    def keep_rows(self, first: int, rows: NDArray[Any]) -> None:
        pass


NO_JOURNAL = NoJournal()


@dataclass
class FileJournal:
    """A journal in a folder. Records wait in memory for at most `seconds` before they are written."""

    folder: Path
    seconds: float = SECONDS
    clock: Callable[[], float] = time.monotonic
    _waiting: dict[str, bytes] = field(default_factory=dict)
    _written: float = field(default=float("-inf"))
    _lock: Any = None

    def texts(self) -> list[Conditioning] | None:
        return unpacked(self._read("conditioning"))

    def keep_texts(self, texts: Sequence[Conditioning]) -> None:
        self._write("conditioning", packed(texts), now=True)

    def tensor(self, name: str) -> Tensor | None:
        found = self._read(name)
        return None if found is None else _tensors(found).get("value")

    def keep(self, name: str, value: Tensor) -> None:
        self._write(name, save({"value": value.detach().cpu().contiguous()}))

    def recorded(self, stage: int, denoise: Denoiser) -> Denoiser:
        """The same denoiser: what it gave before the stop comes from the journal, what it gives now goes into it."""
        calls = 0

        def estimate(x: Tensor, sigma: float, cond: Any) -> Tensor:
            nonlocal calls
            name, calls = f"stage-{stage}-estimate-{calls:05d}", calls + 1
            before = self._estimate(name, sigma)
            if before is not None:
                return before.to(x.device)
            found = denoise(x, sigma, cond)
            self._write(name, save({"value": found.detach().cpu().contiguous(), "sigma": _scalar(sigma)}))
            return found

        return estimate

    def finish_stage(self, stage: int, latents: Tensor) -> None:
        """Keep a stage's latents, and nothing else of it."""
        self._waiting = {name: held for name, held in self._waiting.items() if not name.startswith(f"stage-{stage}-")}
        self._write(f"stage-{stage}", save({"value": latents.detach().cpu().contiguous()}), now=True)
        for file in self.folder.glob(f"stage-{stage}-*"):
            file.unlink(missing_ok=True)

    def rows(self) -> Iterator[NDArray[Any]]:
        """Finished rows (n, W, 3) from the top, without a gap."""
        first = 0
        while (found := self._read(f"rows-{first:08d}")) is not None:
            part = _tensors(found).get("value")
            if part is None or not len(part):
                return
            yield part.numpy()
            first += len(part)

    def keep_rows(self, first: int, rows: NDArray[Any]) -> None:
        self._write(f"rows-{first:08d}", save({"value": torch.from_numpy(np.ascontiguousarray(rows))}))

    def flush(self) -> None:
        """Write what waits. Where the disk refuses, the render goes on and what is on it stays as it is."""
        try:
            for name, content in self._waiting.items():
                write_whole(self.folder / name, hashlib.blake2b(content, digest_size=DIGEST).digest() + content)
            if self._waiting:
                sync_folder(self.folder)
        except WriteError as error:
            log.warning("%s; from here on nothing is written, and a later run would go on from before", error)
            self.seconds = float("inf")
        self._waiting, self._written = {}, self.clock()

    def remove(self) -> None:
        """The render is done: nothing stays."""
        self._waiting = {}
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def lock(self) -> None:
        """Hold the job for this process. OutputError where another one works on it."""
        self._lock = _locked(self.folder)

    def close(self) -> None:
        """The render ends unfinished: what waits is written, where the disk takes it."""
        self.flush()
        self.release()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _estimate(self, name: str, sigma: float) -> Tensor | None:
        found = self._read(name)
        if found is None:
            return None
        held = _tensors(found)
        return held.get("value") if torch.equal(held.get("sigma", torch.empty(0)), _scalar(sigma)) else None

    def _read(self, name: str) -> bytes | None:
        return self._waiting[name] if name in self._waiting else read_whole(self.folder / name)

    def _write(self, name: str, content: bytes, now: bool = False) -> None:
        self._waiting[name] = content
        if self.seconds == float("inf"):
            self._waiting = {}
        elif now or self.clock() - self._written >= self.seconds:
            self.flush()


def _scalar(sigma: float) -> Tensor:
    return torch.tensor([sigma], dtype=torch.float64)


def _tensors(content: bytes) -> dict[str, Tensor]:
    try:
        held: dict[str, Tensor] = load(content)
        return held
    except (SafetensorError, ValueError):
        return {}


def packed(texts: Sequence[Conditioning]) -> bytes:
    """Conditions of some prompts as one record; those that hold no more than what the text towers gave."""
    values: dict[str, Tensor] = {}
    for index, text in enumerate(texts):
        for name in ("tokens", "mask", "pooled"):
            value = getattr(text, name)
            if value is not None:
                values[f"{index}.{name}"] = value.detach().cpu().contiguous()
        values[f"{index}.cell_px"] = torch.tensor(text.cell_px)
    content: bytes = save(values)
    return content


def unpacked(content: bytes | None) -> list[Conditioning] | None:
    held = {} if content is None else _tensors(content)
    count = sum(name.endswith(".cell_px") for name in held)
    if not count:
        return None
    return [
        Conditioning(
            tokens=held[f"{i}.tokens"],
            mask=held.get(f"{i}.mask"),
            pooled=held.get(f"{i}.pooled"),
            cell_px=int(held[f"{i}.cell_px"]),
        )
        for i in range(count)
    ]


def read_whole(file: Path) -> bytes | None:
    """What a record holds; None where it is not there, or not as it was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, held = content[:DIGEST], content[DIGEST:]
    if len(digest) < DIGEST or hashlib.blake2b(held, digest_size=DIGEST).digest() != digest:
        log.warning("%s is torn and not trusted", file)
        return None
    return held


def write_whole(file: Path, content: bytes) -> None:
    """The file whole, or not there. WriteError where the disk refuses."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WriteError(
            f"journal {file.parent}: {error.strerror or error}; make room, or give --no-journal (nothing can be resumed)"
        ) from error


def sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _locked(folder: Path) -> Any:
    """An open file that holds the folder's lock for as long as it is open; the system lets go of a killed process's."""
    opened = (folder / "lock").open("a")
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return opened
    except OSError:
        opened.close()
        raise OutputError(f"{folder}: another process renders this; wait for it or give another -o") from None
    return opened


def folder_of(output: Path) -> Path:
    return output.with_name(f".{output.name}.hires")


def open_journal(
    output: Path, job: Mapping[str, Any], *, resume: bool = False, restart: bool = False, seconds: float = SECONDS
) -> FileJournal:
    """The journal of a render of `job` to `output`: the one that is there, if it is of this job, else a new one.

    RequestError where `resume` finds nothing to go on from, or a job of another render is there (naming what differs) and
    `restart` was not given; OutputError where another process works on it.
    """
    folder = folder_of(output)
    before = read_job(folder)
    if before is not None and not restart:
        changed = differences(before, job)
        if changed:
            raise RequestError(
                f"output {output}: an unfinished render is there that differs in {', '.join(changed)}; "
                "give that again to go on, --restart to throw it away, or another -o"
            )
    elif resume:
        raise RequestError(f"--resume: nothing unfinished is there for {output}; leave --resume out to begin")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise WriteError(f"journal {folder}: {error.strerror or error}; render with --no-journal") from error
    journal = FileJournal(folder, seconds)
    journal.lock()
    if before is None or restart:
        for file in folder.iterdir():
            if file.name != "lock":
                file.unlink(missing_ok=True)
        content = json.dumps(dict(job), sort_keys=True).encode()
        write_whole(folder / "job.json", hashlib.blake2b(content, digest_size=DIGEST).digest() + content)
        sync_folder(folder)
    else:
        log.warning("going on with the unfinished render of %s", output)
    return journal


def read_job(folder: Path) -> dict[str, Any] | None:
    """The job of a folder; None where there is none that can be trusted."""
    content = read_whole(folder / "job.json")
    if content is None:
        return None
    try:
        job = json.loads(content)
    except ValueError:
        return None
    return job if isinstance(job, dict) else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what is not the same in two jobs, those of nested values with a dot."""
    now = json.loads(json.dumps(dict(now), sort_keys=True))
    found: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{name}.{inner}" for inner in differences(a, b)]
        elif a != b:
            found.append(f"{name} ({_short(a)}, now {_short(b)})")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedJob:
    """What `hires jobs` shows of a folder: the output, its size, how far it came, when it last wrote, and its bytes."""

    output: str
    size: str
    prompt: str
    progress: str
    age_seconds: float
    held_bytes: int
    folder: str

    def to_json(self) -> dict[str, Any]:
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def unfinished(where: Path) -> list[UnfinishedJob]:
    """The unfinished jobs of a folder, the latest last."""
    found = []
    for folder in sorted(where.glob(".*.hires")):
        job, files = read_job(folder), [file for file in folder.iterdir() if file.is_file()]
        if not files:
            continue
        request = job.get("request", {}) if job else {}
        found.append(
            UnfinishedJob(
                output=str(folder.with_name(folder.name[1 : -len(".hires")])),
                size=str(request.get("size", "unknown")),
                prompt=str(request.get("prompt", "")),
                progress=_progress(files) if job else "torn; it would begin again",
                age_seconds=round(time.time() - max(file.stat().st_mtime for file in files), 1),
                held_bytes=sum(file.stat().st_size for file in files),
                folder=str(folder),
            )
        )
    return sorted(found, key=lambda job: -job.age_seconds)


def _progress(files: Sequence[Path]) -> str:
    names = {file.name for file in files}
    stages = sorted(name for name in names if name.startswith("stage-") and name.count("-") == 1)
    bands = sum(name.startswith("rows-") for name in names)
    if bands:
        return f"{bands} bands decoded"
    estimates = sum("-estimate-" in name for name in names)
    return f"{len(stages)} stages finished, {estimates} evaluations of the next"


def clean(jobs: Sequence[UnfinishedJob]) -> list[UnfinishedJob]:
    """Remove jobs that no process works on; those removed."""
    removed = []
    for job in jobs:
        try:
            lock = _locked(Path(job.folder))
        except OutputError:
            continue
        lock.close()
        shutil.rmtree(job.folder, ignore_errors=True)
        removed.append(job)
    return removed
