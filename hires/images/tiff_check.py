"""Checks that a TIFF file is complete before its pixels are read.

Each directory, strip and tile that it lists must end before the file does.

libvips gives black or grey for tiles that lie beyond the end of a file, so a file that was cut short has to be recognised
before its pixels are read. Only directories and lists of offsets are read here, no pixels. Classic TIFF and BigTIFF.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hires.errors import RequestError

TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SIZE_OF_TYPE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
UNSIGNED = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}
SUB_DIRECTORIES = 330
SEGMENTS = ((324, 325, "tile"), (273, 279, "strip"))  # tags of the offsets, of the byte counts
AT_ONCE = 2**16  # values of a list that are held in memory


@dataclass(frozen=True, slots=True)
class Values:
    """Where a tag's values lie in the file."""

    kind: int
    count: int
    offset: int


def check_whole_tiff(path: Path) -> None:
    """RequestError for a TIFF that ends before the last byte that it lists, in any of its pages and pyramid levels.

    A file of another format passes. OSError where the file cannot be opened.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if head not in TIFF_HEADS:
            return
        reason = _Directories(file, head, path.stat().st_size).first_missing()
    if reason is not None:
        raise RequestError(f"picture {str(path)[:200]}: the TIFF is cut short or damaged: {reason}; copy or download it again")


class _MissingError(Exception):
    """Something that the file lists lies beyond its end; the message says what."""


class _Directories:
    """The directories of one file, and what of them lies beyond its end."""

    def __init__(self, file: BinaryIO, head: bytes, size: int) -> None:
        self.file, self.size = file, size
        self.order = "<" if head[:2] == b"II" else ">"
        self.big = b"+" in head
        self.word = "Q" if self.big else "I"  # of offsets and counts
        self.word_bytes = struct.calcsize("=" + self.word)

    def first_missing(self) -> str | None:
        """What lies beyond the end of the file, in words; None where nothing does."""
        try:
            self._walk()
        except _MissingError as missing:
            return str(missing)
        return None

    def _walk(self) -> None:
        waiting, seen = [self._unpacked(self.word, 8 if self.big else 4, "its header")[0]], {0}
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            tags, following = self._directory(at)
            waiting.append(following)
            if SUB_DIRECTORIES in tags:
                waiting += [int(offset) for part in self._parts(tags[SUB_DIRECTORIES]) for offset in part]
            for offsets, counts, what in SEGMENTS:
                if offsets in tags:
                    self._check_segments(tags[offsets], tags.get(counts), what)

    def _directory(self, at: int) -> tuple[dict[int, Values], int]:
        """The tags of the directory at a byte, and where the next directory is (0 for none)."""
        number = "Q" if self.big else "H"
        (count,) = self._unpacked(number, at, "a directory")
        first, entry = at + struct.calcsize("=" + number), 4 + 2 * self.word_bytes
        (following,) = self._unpacked(self.word, first + count * entry, "a directory")
        tags = {}
        for start in range(first, first + count * entry, entry):
            tag, kind, values = self._unpacked("HH" + self.word, start, "a directory")
            offset, length = start + entry - self.word_bytes, values * SIZE_OF_TYPE.get(kind, 0)
            if length > self.word_bytes:
                (offset,) = self._unpacked(self.word, offset, "a directory")
                self._check_end(offset + length, f"the value of tag {tag}")
            tags[tag] = Values(kind, values, offset)
        return tags, following

    def _check_segments(self, offsets: Values, counts: Values | None, what: str) -> None:
        """Tiles or strips: byte counts may be left out, of old files."""
        sizes = None if counts is None or counts.count != offsets.count else self._parts(counts)
        first = 0
        for starts in self._parts(offsets):
            ends = starts.astype(np.float64) + (0 if sizes is None else next(sizes).astype(np.float64))  # no overflow
            late = np.flatnonzero(ends > self.size)
            if late.size:
                self._check_end(int(ends[late[0]]), f"{what} {first + int(late[0])}")
            first += len(starts)

    def _parts(self, values: Values) -> Iterator[NDArray[np.unsignedinteger]]:
        """A tag's whole numbers, `AT_ONCE` at a time; nothing for values of another type."""
        if values.kind not in UNSIGNED:
            return
        kind = np.dtype(self.order + UNSIGNED[values.kind])
        for start in range(0, values.count, AT_ONCE):
            count = min(AT_ONCE, values.count - start)
            self.file.seek(values.offset + start * kind.itemsize)
            yield np.frombuffer(self.file.read(count * kind.itemsize), dtype=kind)

    def _unpacked(self, layout: str, at: int, what: str) -> tuple[int, ...]:
        length = struct.calcsize(self.order + layout)
        self._check_end(at + length, what)
        self.file.seek(at)
        return struct.unpack(self.order + layout, self.file.read(length))

    def _check_end(self, end: int, what: str) -> None:
        if end > self.size:
            raise _MissingError(f"{what} ends at byte {end:,}, the file at byte {self.size:,}")
