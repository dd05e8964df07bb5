"""Writes files that appear whole under their name, or not at all.

What is in the way is an error before any work.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hires.errors import OutputError, WriteError

PART = ".part"


def check_place(path: Path, overwrite: bool) -> Path:
    """The path, if a file can be written there. OutputError says what is in the way."""
    try:
        return _check_place(path, overwrite)
    except OSError as error:
        raise _unusable(path, error) from None


def _check_place(path: Path, overwrite: bool) -> Path:
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
        self._scratch: list[Path] = []
        self.temporary = self.scratch()

    def scratch(self) -> Path:
        """Another empty file in the same folder."""
        with refusing(self.path):
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", suffix=PART, dir=self._folder)
        os.close(handle)
        self._scratch.append(Path(name))
        return self._scratch[-1]

    def commit(self) -> None:
        """The file is whole: synced, then renamed. OutputError where another one has taken its name meanwhile."""
        with refusing(self.path):
            with self.temporary.open("rb+") as file:
                os.fsync(file.fileno())
            self.temporary.chmod(0o666 & ~_umask())
            if self.path.exists() and not self.overwrite:
                raise OutputError(f"output {self.path}: appeared while rendering; give `overwrite` or another name")
            self.temporary.replace(self.path)
        self.discard()

    def discard(self) -> None:
        """Nothing of what is unfinished stays."""
        for file in self._scratch:
            file.unlink(missing_ok=True)


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
