"""How many bytes finished jobs and saved outputs may hold: the oldest go first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SAVED = re.compile(r"\d{8}-\d{6}-\d{4}-\d+\.(png|jpg|webp|tif)")
"""The names of the pictures that `save_images` of A1111's API asks for."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Something on disk that may go."""

    since: float
    """When it was finished, in seconds since 1970."""
    size: int
    """In bytes."""
    remove: Callable[[], None]


def folder_bytes(folder: Path) -> int:
    """What the files of a folder hold."""
    return sum(size for path in folder.rglob("*") if (size := _size(path)) is not None)


def saved_outputs(folder: Path) -> Iterator[Kept]:
    """The pictures that a server saved into a folder; what others put there is not the server's to delete."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if SAVED.fullmatch(path.name) and (size := _size(path)) is not None:
            yield Kept(path.stat().st_mtime, size, lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]


def over(kept: Iterable[Kept], most_bytes: int) -> list[Kept]:
    """What has to go, the oldest first, until the rest holds no more than that; the latest always stays."""
    ordered = sorted(kept, key=lambda each: each.since)
    held, gone = sum(each.size for each in ordered), []
    for each in ordered[:-1]:
        if held <= most_bytes:
            break
        held -= each.size
        gone.append(each)
    return gone


def _size(path: Path) -> int | None:
    """The size of a file; None for what is none, or is gone meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
