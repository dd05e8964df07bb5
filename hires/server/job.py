"""A job: its tasks in order, how far it has come, and its folder on disk."""

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
from typing import TypedDict

from pydantic import TypeAdapter, ValidationError

from hires.client.documents import ENDED, JobDocument, ResultDocument
from hires.errors import HiresError, WriteError
from hires.server.bodies import AnyTask
from hires.server.errors import http_status
from hires.server.progress import Meter
from hires.server.schedule import Waiting
from hires.server.worker import Estimate, FinishedPicture, Worker
from hires.tiling.geometry import Size

log = logging.getLogger(__name__)
FILE = "job.json"
TASK: TypeAdapter[AnyTask] = TypeAdapter(AnyTask)


class StoredPicture(TypedDict):
    """A finished picture in `job.json`."""

    file: str
    seed: int
    seconds: float
    sampler: str
    schedule: str
    steps: int
    guidance: float
    size: list[int]
    """Height, width."""
    notes: list[str]


@dataclass(eq=False)
class Job:
    """One to many pictures in a queue, which alone changes them, under its lock."""

    id: str
    sequence: int
    """Its place in the order in which jobs came."""
    tasks: list[AnyTask]
    """One for each picture."""
    folder: Path
    durable: bool = True
    """Whether it survives a restart; a job whose client waits does not."""
    origin: str = "jobs"
    status: str = "queued"
    """'queued', 'running', or one of `ENDED`."""
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    """Seconds since 1970, as `created` and `started`."""
    attempts: int = 0
    """How often it was started."""
    error: str | None = None
    error_status: int | None = None
    """The HTTP status of the error."""
    pictures: list[FinishedPicture] = field(default_factory=list)
    """Those that are finished."""
    request_digest: str = ""
    """A digest of the request, where the client chose the id."""
    estimates: dict[Worker, tuple[Estimate, ...]] | None = None
    """What each task is expected to take on each kind of device that can run them, by the worker that plans for the kind.

    None where an earlier server planned it, and this one has not yet.
    """
    skipping: bool = False
    """Leave the picture in progress out."""
    stop: str = ""
    """'cancel' stops it for good, 'shutdown' until the next start."""
    meter: Meter = field(init=False)
    ended: Future[None] = field(default_factory=Future)
    """Done when the job has ended, or the server stops."""

    def __post_init__(self) -> None:
        self.meter = Meter(max(1, len(self.tasks)))

    def to_json(self, position: int | None) -> JobDocument:
        """What `GET /jobs/{id}` answers. position: how many of the waiting jobs came before it."""
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
            "results": [self._result(index, picture) for index, picture in enumerate(self.pictures)],
        }

    def fits(self, planner: Worker) -> bool:
        """Whether it was planned on that worker's kind of device, and fits there."""
        return self.estimates is not None and planner in self.estimates

    def as_waiting(self, planner: Worker, now: float) -> Waiting:
        """The job as a free worker of a kind that it fits sees it. now: seconds since 1970."""
        assert self.estimates is not None, "only a planned job is chosen"
        left = self.estimates[planner][len(self.pictures) :]
        return Waiting(
            model=left[0].model if left else None,
            planned_seconds=sum(estimate.seconds for estimate in left),
            waited_seconds=max(0.0, now - self.created),
        )

    def _result(self, index: int, picture: FinishedPicture) -> ResultDocument:
        path = self.folder / picture.file
        return {
            "url": f"/jobs/{self.id}/result" + (f"?picture={index}" if index else ""),
            "file": picture.file,
            "size": str(picture.size),
            "bytes": path.stat().st_size if path.is_file() else 0,
            "seed": picture.seed,
            "seconds": round(picture.seconds, 3),
            "notes": list(picture.notes),
        }

    def fail(self, error: Exception) -> None:
        """Note an error and its HTTP status, and log it; one that hires does not raise on purpose with where it came from."""
        self.error, self.error_status = str(error), http_status(error)
        if isinstance(error, HiresError):
            log.warning("job %s: %s", self.id, error)
            return
        log.error("job %s", self.id, exc_info=error)
        self.error = f"an error in hires, {type(error).__name__}: {self.error[:300]}; the server's log has more"

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
            "wanted": self.request_digest,
            "tasks": [task.model_dump(mode="json") for task in self.tasks],
            "made": [_store(picture) for picture in self.pictures],
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
        """Delete its folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Delete what unfinished pictures left: journals and incomplete files."""
        keep = {FILE} | {picture.file for picture in self.pictures}
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name.startswith(".") or (path.name.startswith("result") and path.name not in keep):
                    path.unlink(missing_ok=True)


def read(folder: Path) -> Job | None:
    """The job in a folder; None, with a warning, where its file is damaged or was written by another version."""
    try:
        stored = json.loads((folder / FILE).read_text(encoding="utf-8"))
        job = Job(
            id=folder.name,
            sequence=int(stored["sequence"]),
            tasks=[TASK.validate_python(task) for task in stored["tasks"]],
            folder=folder,
            durable=bool(stored["durable"]),
            origin=str(stored["origin"]),
            status=str(stored["status"]),
            created=float(stored["created"]),
            started=stored["started"],
            finished=stored["finished"],
            attempts=int(stored["attempts"]),
            error=stored["error"],
            error_status=stored["error_status"],
            pictures=[_load(picture) for picture in stored["made"]],
            request_digest=str(stored["wanted"]),
        )
    except (OSError, ValueError, KeyError, TypeError, ValidationError, HiresError) as error:
        log.warning("%s: left alone, its %s is not understood (%s)", folder, FILE, str(error)[:200])
        return None
    if job.status in ENDED:
        job.ended.set_result(None)
    return job


def _store(picture: FinishedPicture) -> StoredPicture:
    return {
        "file": picture.file,
        "seed": picture.seed,
        "seconds": picture.seconds,
        "sampler": picture.sampler,
        "schedule": picture.schedule,
        "steps": picture.steps,
        "guidance": picture.guidance,
        "size": [picture.size.height, picture.size.width],
        "notes": list(picture.notes),
    }


def _load(stored: StoredPicture) -> FinishedPicture:
    return FinishedPicture(
        file=stored["file"],
        size=Size(*stored["size"]),
        seed=stored["seed"],
        seconds=stored["seconds"],
        sampler=stored["sampler"],
        schedule=stored["schedule"],
        steps=stored["steps"],
        guidance=stored["guidance"],
        notes=tuple(stored["notes"]),
    )


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
