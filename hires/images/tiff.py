"""Writes a tiled BigTIFF with a pyramid from rows as they come.

tifffile writes it in a thread that is fed bands of one row of tiles.

The reduced levels wait as raw rows in a scratch file, a third of the picture's bytes on the disk and none in memory.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from hires.images.boxes import Pixels
from hires.tiling.geometry import Size

if TYPE_CHECKING:
    from tifffile import TiffWriter as TiffFile

TILE = 256
SMALLEST_LEVEL = 512  # a pyramid ends where its longer side is no longer than this
LEVEL = 4  # of zlib
BUFFER_BYTES = 2**23  # of tiles that are compressed at once; tifffile would take 256 MiB


def pyramid(size: Size) -> list[Size]:
    """The reduced pictures below one, each half of the one before, rounded up."""
    levels: list[Size] = []
    while max(size.height, size.width) > SMALLEST_LEVEL:
        size = Size(-(-size.height // 2), -(-size.width // 2))
        levels.append(size)
    return levels


def halved(rows: Pixels) -> Pixels:
    """Rows (2n, W, C) as means of 2 x 2 pixels (n, ceil(W / 2), C); the last column is repeated where W is odd."""
    wide = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2), (0, 0)), mode="edge")
    floating = np.issubdtype(rows.dtype, np.floating)
    parts: Pixels = wide.astype(np.float64 if floating else np.uint32)
    columns = parts[0::2] + parts[1::2]
    total: Pixels = columns[:, 0::2] + columns[:, 1::2]
    return (total / 4 if floating else (total + 2) // 4).astype(rows.dtype)


class Reduced:
    """One level of the pyramid as raw rows in a file; what is above it sends rows, it sends its own to the level below."""

    def __init__(self, size: Size, file: IO[bytes], below: Reduced | None) -> None:
        self.size, self.file, self.below = size, file, below
        self.rows, self._odd = 0, None  # type: int, Pixels | None

    def take(self, rows: Pixels) -> None:
        """Rows of the level above, from top to bottom."""
        if self._odd is not None:
            rows = np.concatenate([self._odd, rows])
        even = len(rows) // 2 * 2
        self._odd = rows[even:].copy() if even < len(rows) else None
        self._put(rows[:even])

    def end(self) -> None:
        """The level above has ended; its last row is repeated where its height is odd."""
        if self._odd is not None:
            self._put(np.repeat(self._odd, 2, axis=0))
        self.file.flush()
        if self.below is not None:
            self.below.end()

    def _put(self, rows: Pixels) -> None:
        if len(rows):
            half = halved(rows)
            self.file.write(half.tobytes())
            self.rows += len(half)
            if self.below is not None:
                self.below.take(half)


class TiffWriter:
    """Rows (n, W, bands) of uint8, uint16 or float32 to a BigTIFF; `finish` after the last, or `abort`.

    scratch: an empty file for each level of `pyramid(size)`.
    """

    def __init__(
        self, path: Path, size: Size, bands: int, dtype: np.dtype[np.generic], icc: bytes | None, scratch: list[Path]
    ) -> None:
        self.path, self.size, self.bands, self.dtype, self.icc = path, size, bands, dtype, icc
        self._scratch = [file.open("wb+") for file in scratch]
        self._levels: list[Reduced] = []
        below: Reduced | None = None
        for level, file in reversed(list(zip(pyramid(size), self._scratch, strict=True))):
            below = Reduced(level, file, below)
            self._levels.insert(0, below)
        self._held: list[Pixels] = []
        self._count = 0
        self._bands: queue.Queue[Pixels | None] = queue.Queue(maxsize=2)
        self._failure: BaseException | None = None
        self._aborted = False
        self._thread = threading.Thread(target=self._run, name="tiff", daemon=True)
        self._thread.start()

    def write(self, rows: Pixels) -> None:
        """Append rows; whole rows of tiles go to the thread. What went wrong there is raised here."""
        if self._levels:
            self._levels[0].take(rows)
        done = 0
        while done < len(rows):
            part = rows[done : done + TILE - self._count]
            self._held.append(part.copy())
            self._count, done = self._count + len(part), done + len(part)
            if self._count == TILE:
                self._send()

    def finish(self, text: Mapping[str, str]) -> None:
        """Write what is left, the levels of the pyramid, and the text as one JSON document in ImageDescription."""
        if self._count:
            self._send()
        if self._levels:
            self._levels[0].end()
        self._put(None)
        self._thread.join()
        self._close()
        if self._failure is not None:
            raise self._failure
        if text:
            from tifffile import TiffFile

            with TiffFile(self.path, mode="r+") as file:
                file.pages[0].tags["ImageDescription"].overwrite(json.dumps(dict(text)))

    def abort(self) -> None:
        """Stop the writer; the file is left unfinished."""
        self._aborted = True
        while self._thread.is_alive():
            try:
                self._bands.put_nowait(None)
            except queue.Full:
                self._bands.get()
            self._thread.join(0.01)
        self._close()

    def _close(self) -> None:
        for file in self._scratch:
            file.close()

    def _send(self) -> None:
        self._put(np.concatenate(self._held))
        self._held, self._count = [], 0

    def _put(self, band: Pixels | None) -> None:
        while self._failure is None:
            try:
                self._bands.put(band, timeout=0.1)
            except queue.Full:
                continue
            return
        if band is not None:
            raise self._failure

    def _run(self) -> None:
        from tifffile import TiffWriter as Writer

        try:
            with Writer(self.path, bigtiff=True) as writer:
                self._page(writer, self.size, self._whole(), subifds=len(self._levels))
                for level in self._levels:
                    self._page(writer, level.size, self._reduced(level), subfiletype=1)
        except BaseException as error:  # noqa: BLE001  it is raised where rows are handed over
            self._failure = error

    def _page(self, writer: TiffFile, size: Size, tiles: Iterator[Pixels], subfiletype: int = 0, subifds: int = 0) -> None:
        floating = np.issubdtype(self.dtype, np.floating)  # whose predictor needs more codecs than tifffile brings
        grey = self.bands < 3
        writer.write(
            tiles,
            shape=(size.height, size.width) if self.bands == 1 else (size.height, size.width, self.bands),
            dtype=self.dtype,
            tile=(TILE, TILE),
            photometric="minisblack" if grey else "rgb",
            planarconfig=None if self.bands == 1 else "contig",
            extrasamples=["unassalpha"] if self.bands in (2, 4) else None,
            compression="zlib",
            compressionargs={"level": LEVEL},
            predictor=None if floating else 2,
            iccprofile=self.icc,
            description="{}" if subfiletype == 0 else None,
            software=False,
            metadata=None,
            subfiletype=subfiletype,
            subifds=subifds,
            maxworkers=min(8, os.cpu_count() or 1),
            buffersize=BUFFER_BYTES,
        )

    def _whole(self) -> Iterator[Pixels]:
        while (band := self._bands.get()) is not None:
            yield from self._tiles(band)
        if self._aborted:
            raise InterruptedError("aborted")

    def _reduced(self, level: Reduced) -> Iterator[Pixels]:
        level.file.seek(0)
        row = level.size.width * self.bands * self.dtype.itemsize
        for top in range(0, level.size.height, TILE):
            rows = min(TILE, level.size.height - top)
            raw = np.frombuffer(level.file.read(rows * row), dtype=self.dtype)
            yield from self._tiles(raw.reshape(rows, level.size.width, self.bands))

    def _tiles(self, band: Pixels) -> Iterator[Pixels]:
        """The tiles of one row of tiles, whole: what lies outside the picture repeats its edge."""
        height, width = band.shape[:2]
        for left in range(0, width, TILE):
            tile = band[:, left : left + TILE]
            whole = np.pad(tile, ((0, TILE - height), (0, TILE - tile.shape[1]), (0, 0)), mode="edge")
            yield whole[..., 0] if self.bands == 1 else whole
