"""Unfinished renders of a folder: what `hires jobs` lists and cleans."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from hires.errors import HiresError, RequestError
from hires.resume.journal import SUFFIX, read_job, remove_folder
from hires.resume.records import LOCK, hold
from hires.units import Json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedJob:
    """What `hires jobs` shows of a folder."""

    output: str
    """The file that is not finished."""
    size: str
    """WIDTHxHEIGHT."""
    prompt: str
    progress: str
    """How far it came."""
    age_seconds: float
    """Since it last wrote."""
    held_bytes: int
    """Bytes on the disk."""
    folder: str
    """The journal's folder."""

    def to_json(self) -> Json:
        """The values as plain JSON."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


def unfinished(where: Path) -> list[UnfinishedJob]:
    """The unfinished jobs of a folder, the latest last. RequestError for a path that is no folder."""
    if not where.is_dir():
        raise RequestError(f"{where}: is not a folder; give the one that outputs are in")
    jobs = [_unfinished(folder) for folder in where.glob(f".*{SUFFIX}") if (folder / LOCK).is_file()]
    return sorted((job for job in jobs if job is not None), key=lambda job: -job.age_seconds)


def _unfinished(folder: Path) -> UnfinishedJob | None:
    """None where it is finished meanwhile."""
    files: dict[str, os.stat_result] = {}
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                files[file.name] = file.stat()
    if not files:
        return None
    job = read_job(folder)
    request = job.get("request", {}) if job else {}
    return UnfinishedJob(
        output=str(folder.with_name(folder.name[1 : -len(SUFFIX)])),
        size=str(request.get("size", "unknown")),
        prompt=str(request.get("prompt", "")),
        progress=_progress(files) if job else "torn; it would begin again",
        age_seconds=round(time.time() - max(stat.st_mtime for stat in files.values()), 1),
        held_bytes=sum(stat.st_size for stat in files.values()),
        folder=str(folder),
    )


def _progress(names: Iterable[str]) -> str:
    names = set(names)
    bands = sum(name.startswith("rows-") for name in names)
    if bands:
        return f"{bands} bands decoded"
    stages = sum(name.startswith("stage-") and name.count("-") == 1 for name in names)
    estimates = sum("-estimate-" in name for name in names)
    return f"{stages} stages finished, {estimates} evaluations of the next"


def clean(jobs: Sequence[UnfinishedJob]) -> list[UnfinishedJob]:
    """Remove jobs that no process works on; those removed."""
    removed = []
    for job in jobs:
        try:
            if remove_folder(Path(job.folder), hold(Path(job.folder))):
                removed.append(job)
        except HiresError as error:
            log.warning("%s", error)
    return removed
