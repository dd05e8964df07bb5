"""A job: its tasks in order, how far it has come, and its folder on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hires.client.documents import ENDED, JobDocument, ResultDocument
from hires.errors import HiresError, WriteError
from hires.server.bodies import AnyTask
from hires.server.errors import ConflictError, http_status
from hires.server.progress import Meter
from hires.server.schedule import Waiting
from hires.server.storage.staging import make_private
from hires.server.worker import Estimate, FinishedPicture, Worker
from hires.tiling.geometry import Size

log = logging.getLogger(__name__)
FILE = "job.json"
DAMAGED = "job.json.damaged"
"""What a file is renamed to that is not understood."""
Time = Annotated[float, Field(ge=0, le=1e11)]
"""Seconds since 1970."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
Side = Annotated[int, Field(ge=1, le=2**30)]


class StoredPicture(BaseModel):
    """A finished picture in `job.json`."""

    model_config = ConfigDict(allow_inf_nan=False)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.[a-z]+$")]
    seed: int
    seconds: float
    sampler: str
    schedule: str
    steps: int
    guidance: float
    size: tuple[Side, Side]
    """Height, width."""
    notes: list[str]

    @classmethod
    def of(cls, picture: FinishedPicture) -> StoredPicture:
        """What is stored of a picture."""
        values = {name: getattr(picture, name) for name in cls.model_fields if name not in ("size", "notes")}
        return cls(**values, size=(picture.size.height, picture.size.width), notes=list(picture.notes))

    def picture(self) -> FinishedPicture:
        """The picture that was stored."""
        return FinishedPicture(**self.model_dump(exclude={"size", "notes"}), size=Size(*self.size), notes=tuple(self.notes))


class StoredJob(BaseModel):
    """The content of `job.json`; whatever else a file may hold is not a job."""

    model_config = ConfigDict(allow_inf_nan=False)

    id: str
    sequence: Count
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    durable: bool
    origin: str
    created: Time
    started: Time | None
    finished: Time | None
    attempts: Count
    error: str | None
    error_status: int | None
    wanted: str
    """The digest of the request."""
    tasks: Annotated[list[AnyTask], Field(min_length=1)]
    made: list[StoredPicture]


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
        document = StoredJob.model_construct(
            **{name: getattr(self, name) for name in StoredJob.model_fields if hasattr(self, name)},
            wanted=self.request_digest,
            made=[StoredPicture.of(picture) for picture in self.pictures],
        )
        part = self.folder / f".{FILE}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8", errors="replace") as opened:  # a path in an error may be no text
                json.dump(document.model_dump(mode="json"), opened, ensure_ascii=False)
                opened.flush()
                os.fsync(opened.fileno())
            part.replace(self.folder / FILE)
            _sync(self.folder)
            _sync(self.folder.parent)
        except OSError as error:
            raise WriteError(f"{self.folder}: {error.strerror or error}; make room on that disk") from error

    def move(self, target: Path) -> None:
        """Make its folder, with all that is in it, another in one step. ConflictError where that holds something."""
        try:
            make_private(target.parent)
            make_private(self.folder)
            self.folder.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise ConflictError(f"id {self.id}: its folder holds a {DAMAGED} or other files; give a new one") from None
            raise WriteError(f"{target}: {error.strerror or error}; make room on that disk") from error
        self.folder = target
        _sync(target.parent)

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
    """The job in a folder; None where there is none.

    A file that is damaged, or that another version wrote, is renamed to `DAMAGED` and named in the log.
    """
    file = folder / FILE
    try:
        content = file.read_bytes()
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            log.warning("%s: left alone, it cannot be read (%s)", file, error.strerror or error)
        return None
    try:
        stored = StoredJob.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _set_aside(file, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"[:200])
        return None
    job = Job(
        id=folder.name,
        folder=folder,
        pictures=[picture.picture() for picture in stored.made],
        request_digest=stored.wanted,
        **{name: getattr(stored, name) for name in StoredJob.model_fields if name not in ("id", "wanted", "made")},
    )
    if job.status in ENDED:
        job.ended.set_result(None)
    return job


def _set_aside(file: Path, reason: str) -> None:
    """Rename a file that is not understood, so that its folder is no job and nothing of it is lost."""
    aside = file.with_name(DAMAGED)
    try:
        file.replace(aside)
    except OSError as error:
        log.warning("%s: left alone, is not understood (%s) and cannot be renamed (%s)", file, reason, error.strerror or error)
        return
    log.warning("%s: is not understood (%s); set aside as %s", file, reason, aside)


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
