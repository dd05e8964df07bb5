"""Folders for what is not a job yet or no longer one; a killed server's are cleared."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hires.errors import WriteError

OWN = re.compile(r"tmp[a-z0-9_]{8}", re.IGNORECASE)
"""The names that `tempfile.mkdtemp` gives."""
TAKEN_IN = re.compile(r"\.job\.json\.part|(input-|input-\d+-)?(init|mask|control|picture)(-\d+)?\.png")
"""The files of a job that is not stored yet."""


class Staging:
    """Folders that are deleted in the end: by whoever opened them, else at the next start.

    They lie on the disk of the jobs, so that a folder becomes a job's, or stops being one, in one step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def open(self) -> Iterator[Path]:
        """An empty folder; what is still in it at the end is deleted."""
        folder = self._new()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def discard(self, folder: Path) -> None:
        """Delete a job's folder: a kill meanwhile leaves it whole, or here."""
        with contextlib.suppress(OSError, WriteError):
            staged = self._new()
            folder.rename(staged / folder.name)
            folder = staged
        shutil.rmtree(folder, ignore_errors=True)

    def clear(self) -> None:
        """Delete what a killed server left here."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if OWN.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _new(self) -> Path:
        try:
            make_private(self.folder)
            return Path(tempfile.mkdtemp(dir=self.folder))
        except OSError as error:
            raise WriteError(f"{self.folder}: {error.strerror or error}; make room on that disk") from error


def make_private(folder: Path) -> None:
    """Make a folder that only its owner can look into, and a folder that is there already such a one."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def is_unfinished(folder: Path) -> bool:
    """Whether a folder without a job holds nothing but a request's pictures, as a kill left them in earlier versions."""
    return all(path.is_file() and TAKEN_IN.fullmatch(path.name) for path in folder.iterdir())
