"""A job: pictures in the order they are to be made, where it stands, and its folder on disk."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hires.errors import HiresError, WriteError
from hires.server.errors import http_status
from hires.server.progress import Meter
from hires.server.tasks import AnyTask
from hires.server.worker import FinishedPicture
from hires.tiling.geometry import Size

log = logging.getLogger(__name__)
FILE = "job.json"
ENDED = ("done", "failed", "cancelled")
TASK: TypeAdapter[Any] = TypeAdapter(AnyTask)
Status = str  # 'queued', 'running', or one of ENDED


@dataclass(eq=False)
class Job:
    """Changed by the queue alone, under its lock. durable: lives on after a restart; a job of a waiting client does not.

    wanted: a digest of what a client asked for under an id of its own. weights: by task but for its seed, the seconds that each
    of its stages is expected to take. skipping: leave the picture in progress out; stop: 'cancel' for good, 'shutdown' until
    the next start.
    """

    id: str
    sequence: int
    tasks: list[Any]
    folder: Path
    durable: bool = True
    origin: str = "jobs"
    status: Status = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    attempts: int = 0
    error: str | None = None
    error_status: int | None = None
    made: list[FinishedPicture] = field(default_factory=list)
    wanted: str = ""
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    skipping: bool = False
    stop: str = ""
    meter: Meter = field(init=False)
    ended: Future[None] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.meter = Meter(max(1, len(self.tasks)))

    def to_json(self, position: int | None) -> dict[str, Any]:
        """What `GET /jobs/{id}` answers. position: how many are before it in the queue."""
        progress = self.meter.now.to_json()
        if self.status == "done":
            progress["fraction"] = 1.0
        return {
            "id": self.id,
            "kind": self.tasks[0].kind if self.tasks else "",
            "status": self.status,
            "position": position,
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "progress": progress,
            "prompt": self.tasks[0].prompt[:200] if self.tasks else "",
            "error": self.error,
            "results": [self._result(index, made) for index, made in enumerate(self.made)],
        }

    def _result(self, index: int, made: FinishedPicture) -> dict[str, Any]:
        path = self.folder / made.file
        return {
            "url": f"/jobs/{self.id}/result" + (f"?picture={index}" if index else ""),
            "file": made.file,
            "size": str(made.size),
            "bytes": path.stat().st_size if path.is_file() else 0,
            "seed": made.seed,
            "seconds": round(made.seconds, 3),
            "notes": list(made.notes),
        }

    def fail(self, error: BaseException) -> None:
        self.error, self.error_status = str(error), http_status(error)

    def save(self) -> None:
        """Write the job's file, whole and on the disk before this returns. WriteError where the disk refuses."""
        document = {
            "id": self.id,
            "sequence": self.sequence,
            "status": self.status,
            "durable": self.durable,
            "origin": self.origin,
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "attempts": self.attempts,
            "error": self.error,
            "error_status": self.error_status,
            "wanted": self.wanted,
            "tasks": [task.model_dump(mode="json") for task in self.tasks],
            "made": [_made_to_json(made) for made in self.made],
        }
        part = self.folder / f".{FILE}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8") as opened:
                json.dump(document, opened)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(self.folder / FILE)
            _sync(self.folder)
            _sync(self.folder.parent)
        except OSError as error:
            raise WriteError(f"{self.folder}: {error.strerror or error}; make room on that disk") from error

    def remove(self) -> None:
        """Its folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """What an unfinished picture left: its journal and its file in parts."""
        held = {FILE} | {made.file for made in self.made}
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(".") or (path.name.startswith("result") and path.name not in held):
                    path.unlink(missing_ok=True)


def read(folder: Path) -> Job | None:
    """The job of a folder; None, with a warning, where its file is damaged or of another version."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        job = Job(
            id=folder.name,
            sequence=int(found["sequence"]),
            tasks=[TASK.validate_python(task) for task in found["tasks"]],
            folder=folder,
            durable=bool(found["durable"]),
            origin=str(found["origin"]),
            status=str(found["status"]),
            created=float(found["created"]),
            started=found["started"],
            finished=found["finished"],
            attempts=int(found["attempts"]),
            error=found["error"],
            error_status=found["error_status"],
            made=[_made_from_json(made) for made in found["made"]],
            wanted=str(found["wanted"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError, HiresError) as error:
        log.warning("%s: left alone, its %s is not understood (%s)", folder, FILE, str(error)[:200])
        return None
    if job.status in ENDED:
        job.ended.set_result(None)
    return job


def _made_to_json(made: FinishedPicture) -> dict[str, Any]:
    fields = ("file", "seed", "seconds", "sampler", "schedule", "steps", "guidance")
    plain = {name: getattr(made, name) for name in fields}
    return plain | {"size": [made.size.height, made.size.width], "notes": list(made.notes)}


def _made_from_json(found: dict[str, Any]) -> FinishedPicture:
    return FinishedPicture(**(found | {"size": Size(*found["size"]), "notes": tuple(found["notes"])}))


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
