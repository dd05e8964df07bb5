"""The state of a model's files on disk, by which one that changed is noticed.

Reads headers only; imports no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hires.checkpoints.model import ModelSpec

HEADER_BYTES = 2**16
"""What is read of a file that states no length of its header."""
LONGEST_HEADER = 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """A file as it was when it was looked at."""

    path: str
    size: int
    """In bytes."""
    changed: int
    """The time of its last change, in nanoseconds."""
    header: str
    """A digest of its header: of what a .safetensors states, else of its first 64 KiB."""


Files = tuple[FileState, ...]


def files_of(spec: ModelSpec, components: Sequence[str]) -> Files:
    """The files that these components of a model are read from."""
    parts = (spec.parts.get(name) for name in components)
    return states(part.path for part in parts if part is not None and part.path is not None)


def states(paths: Iterable[Path]) -> Files:
    """The state of every file of these paths, folders with all that is in them; each file once."""
    files: dict[Path, None] = {}
    for path in (path.expanduser() for path in paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
            if file.is_file():
                files[file] = None
    return tuple(_state(file) for file in files)


def _state(file: Path) -> FileState:
    known = file.stat()
    with file.open("rb") as opened:
        head = opened.read(HEADER_BYTES)
        if file.suffix == ".safetensors":
            length = min(int.from_bytes(head[:8], "little"), LONGEST_HEADER)
            head += opened.read(max(0, 8 + length - HEADER_BYTES))
    digest = hashlib.blake2b(head, digest_size=16).hexdigest()
    return FileState(path=str(file), size=known.st_size, changed=known.st_mtime_ns, header=digest)
