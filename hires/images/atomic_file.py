"""Writes files that appear whole under their name, or not at all.

What is in the way is an error before any work.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hires.errors import OutputError, WriteError

PART = ".part"
LONGEST_NAME = 240
"""Bytes of an output's name: a file system takes 255, and what is unfinished has 15 more."""
YOUNG_SECONDS = 1.0
"""What is no older may not be locked yet by the process that made it."""


def check_place(path: Path, overwrite: bool) -> Path:
    """The path, if a file can be written there. OutputError says what is in the way."""
    try:
        return _check_place(path, overwrite)
    except OSError as error:
        raise _unusable(path, error) from None


def _check_place(path: Path, overwrite: bool) -> Path:
    length = len(os.fsencode(path.name))
    if length > LONGEST_NAME:
        raise OutputError(f"output {path.name[:60]}...: a name of {length} bytes; give one of at most {LONGEST_NAME}")
    if path.is_dir():
        raise OutputError(f"output {path}: is a folder; name a file in it, such as {path / 'picture.png'}")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"output {path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"output {path}: the folder {folder} is not writable")
    if path.exists() and not overwrite:
        raise OutputError(f"output {path}: exists already; give `overwrite` or another name")
    return path


def check_folder(folder: Path) -> Path:
    """The path, if a folder for several pictures is there or can be made. OutputError says what is in the way."""
    try:
        there, parent = folder.exists(), folder.parent.is_dir()
        if there and not folder.is_dir():
            raise OutputError(f"output {folder}: is a file; give the name of a folder for several pictures")
        if not parent:
            raise OutputError(f"output {folder}: the folder {folder.parent} does not exist; create it first")
        if not os.access(folder if there else folder.parent, os.W_OK):
            raise OutputError(f"output {folder}: the folder {folder if there else folder.parent} is not writable")
    except OSError as error:
        raise _unusable(folder, error) from None
    return folder


def make_folder(folder: Path) -> None:
    """Make a folder for several pictures where it is not there; OutputError as in `check_folder`."""
    try:
        check_folder(folder).mkdir(exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error) from None


def _unusable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"output {str(path)[:120]}: cannot be written ({error.strerror}); give another `output`")


class Unfinished:
    """A file beside its place, or `within` a folder that is cleared after a kill (a journal's), until `commit` renames it.

    `scratch` gives further files that go with it either way. WriteError where the disk refuses.
    """

    def __init__(self, path: Path, overwrite: bool, within: Path | None = None) -> None:
        self.path, self.overwrite, self._folder = path, overwrite, _place(path, within)
        self._scratch: dict[Path, int] = {}
        remove_dead(path)
        self.temporary = self.scratch()

    def scratch(self) -> Path:
        """Another empty file in the same folder."""
        with refusing(self.path):
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=PART, dir=self._folder)
        _lock(handle)
        self._scratch[Path(name)] = handle
        return Path(name)

    def commit(self) -> None:
        """The file is whole: synced, then renamed. OutputError where another one has taken its name meanwhile."""
        with refusing(self.path):
            with self.temporary.open("rb+") as file:
                os.fsync(file.fileno())
            self.temporary.chmod(0o666 & ~_umask())
            if self.path.exists() and not self.overwrite:
                raise OutputError(f"output {self.path}: appeared while rendering; give `overwrite` or another name")
            os.close(self._scratch.pop(self.temporary))  # Windows renames no open file
            self.temporary.replace(self.path)
        self.discard()

    def discard(self) -> None:
        """Nothing of what is unfinished stays."""
        self.temporary.unlink(missing_ok=True)
        for file, handle in self._scratch.items():
            with contextlib.suppress(OSError):
                os.close(handle)
            file.unlink(missing_ok=True)
        self._scratch.clear()


def remove_dead(path: Path) -> None:
    """Remove the unfinished files of an output that a process left which was killed; one that works holds a lock on its own."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(PART)}")
    with contextlib.suppress(OSError):
        for file in [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > YOUNG_SECONDS and _is_dead(file):
                    file.unlink()


def _is_dead(file: Path) -> bool:
    handle = os.open(file, os.O_RDWR)
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Hold an open file until it is closed or the process ends; False where another process holds it or locks are unknown."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Errors of the disk as WriteErrors of an output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"output {path}: {reason}; nothing was written; make room or give another `output`") from error


def _place(path: Path, within: Path | None) -> Path:
    """`within` where it is there and a file can be renamed from it, else the output's own folder."""
    try:
        return within if within is not None and within.stat().st_dev == path.parent.stat().st_dev else path.parent
    except OSError:
        return path.parent


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
