"""Writes PNG of any height in the memory of a few blocks of rows.

Text is read without decoding pixels.

After the PNG specification (third edition, W3C 2025). Rows are filtered and deflated in blocks of fixed height, each on its
own with the 32 KiB before it as dictionary, so that blocks are compressed side by side and the bytes do not depend on how rows
come.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from hires.tiling.geometry import Size

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_SIDE = 2**31 - 1
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by bands: grey, grey and alpha, colour, colour and alpha
BLOCK_BYTES = 2**20
WINDOW = 2**15
LEVEL = 4  # of zlib; 6 takes three times as long for 3 % less on photographs
MOST_WORKERS = 8
Bytes = NDArray[np.uint8]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def text_chunk(key: str, value: str) -> bytes:
    """TEXt where the text is ASCII, else iTXt. Keys are cut to the 79 Latin-1 characters that the format has."""
    name = key.encode("latin-1", "replace")[:79]
    if value.isascii() and "\0" not in value:
        return chunk(b"tEXt", name + b"\0" + value.encode("ascii"))
    return chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode("utf-8"))


def colour_chunks(icc: bytes | None) -> bytes:
    """The profile that was given, else sRGB with the fallbacks that the specification recommends."""
    if icc is not None:
        return chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc, 9))
    primaries = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    return chunk(b"sRGB", b"\0") + chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"cHRM", primaries)


class PngWriter:
    """Rows (n, W, bands) of uint8 or uint16 to a file that is open for writing; `finish` after the last, or `abort`."""

    def __init__(self, file: IO[bytes], size: Size, bands: int, dtype: np.dtype[np.generic], icc: bytes | None = None) -> None:
        self.file, self.depth = file, dtype.itemsize
        self.step = bands * self.depth  # bytes of a pixel
        self.stride = size.width * self.step
        self.block_rows = max(1, BLOCK_BYTES // (self.stride + 1))
        workers = min(MOST_WORKERS, os.cpu_count() or 1)
        self._pool, self._most = ThreadPoolExecutor(workers, "png"), 2 * workers
        self._waiting: deque[Future[bytes]] = deque()
        self._rows: list[Bytes] = []  # of the block that is not full
        self._held = 0
        self._above: Bytes = np.zeros(self.stride, dtype=np.uint8)
        self._before, self._check, self._head = b"", 1, b"\x78\x5e"  # zlib's header: deflate, 32 KiB window
        colour = COLOUR_TYPES[bands]
        header = struct.pack(">IIBBBBB", size.width, size.height, 8 * self.depth, colour, 0, 0, 0)
        self.file.write(SIGNATURE + chunk(b"IHDR", header) + colour_chunks(icc))

    def text(self, text: Mapping[str, str]) -> None:
        """Before the first rows, or at the end: the chunks of pixels are not to be parted."""
        for key, value in text.items():
            self.file.write(text_chunk(key, value))

    def write(self, rows: NDArray[np.generic]) -> None:
        """Append rows; whole blocks go to the compressors, and what they have finished to the file."""
        coded = rows.astype(rows.dtype.newbyteorder(">"), copy=False)
        flat = np.ascontiguousarray(coded).view(np.uint8).reshape(len(rows), self.stride)
        done = 0
        while done < len(flat):
            part = flat[done : done + self.block_rows - self._held]
            self._rows.append(part)
            self._held, done = self._held + len(part), done + len(part)
            if self._held == self.block_rows:
                self._compress(last=False)
        self._rows = [part.copy() if part.base is not None else part for part in self._rows]  # the caller's may change

    def finish(self, text: Mapping[str, str]) -> None:
        """Write what is left, the check sum, the text and the end."""
        self._compress(last=True)
        while self._waiting:
            self._put()
        self._pool.shutdown()
        self.file.write(chunk(b"IDAT", struct.pack(">I", self._check)))
        self.text(text)
        self.file.write(chunk(b"IEND", b""))

    def abort(self) -> None:
        """Stop the workers; the file is left unfinished."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def _compress(self, last: bool) -> None:
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, self.stride), dtype=np.uint8)
        block = filtered(rows, self._above, self.step).tobytes()
        self._check = zlib.adler32(block, self._check)
        self._waiting.append(self._pool.submit(deflated, block, self._before, last))
        self._before = (self._before + block)[-WINDOW:]
        if len(rows):
            self._above = rows[-1].copy()
        self._rows, self._held = [], 0
        while len(self._waiting) > self._most or (self._waiting and self._waiting[0].done()):
            self._put()

    def _put(self) -> None:
        self.file.write(chunk(b"IDAT", self._head + self._waiting.popleft().result()))
        self._head = b""


def deflated(block: bytes, before: bytes, last: bool) -> bytes:
    """A raw deflate stream's next part: ends on a byte, reads nothing but `before`."""
    deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_FILTERED, before)
    return deflater.compress(block) + deflater.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


def filtered(rows: Bytes, above: Bytes, step: int) -> Bytes:
    """Rows (n, stride) as filter byte and differences (n, 1 + stride): to the left, to above or to the mean of both.

    Each row takes the filter whose differences are smallest in sum (the specification's heuristic). above: the row before
    the first.
    """
    if not len(rows):
        return np.empty((0, 1 + rows.shape[1]), dtype=np.uint8)
    up = np.concatenate([above[None], rows[:-1]])
    left = np.zeros_like(rows)
    left[:, step:] = rows[:, :-step]
    mean = (left & up) + ((left ^ up) >> 1)  # floor((left + up) / 2) without leaving the byte
    ways = ((1, rows - left), (2, rows - up), (3, rows - mean))
    sums = np.stack([np.abs(filtered.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64) for _, filtered in ways])
    best = sums.argmin(0)
    result = np.empty((len(rows), 1 + rows.shape[1]), dtype=np.uint8)
    for at, (code, filtered) in enumerate(ways):
        chosen = best == at
        result[chosen, 0] = code
        result[chosen, 1:] = filtered[chosen]
    return result


def chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Kind and length of every chunk, the file standing at its data. ValueError for what is no PNG."""
    if file.read(8) != SIGNATURE:
        raise ValueError("no PNG")
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        place = file.tell()
        yield kind, length
        file.seek(place + length + 4)
        if kind == b"IEND":
            return


LONGEST_TEXT = 2**26  # bytes of a text chunk, and of what it may unpack to


def read_png_text(path: Path) -> dict[str, str]:
    """All text of a PNG, before and after its pixels, which are skipped. ValueError for what is no PNG."""
    texts: dict[str, str] = {}
    with path.open("rb") as file:
        for kind, length in chunks(file):
            if kind in (b"tEXt", b"zTXt", b"iTXt") and length <= LONGEST_TEXT:
                key, _, rest = file.read(length).partition(b"\0")
                texts[key.decode("latin-1")] = _text(kind, rest)
    return texts


def _text(kind: bytes, rest: bytes) -> str:
    if kind == b"tEXt":
        return rest.decode("latin-1")
    if kind == b"zTXt":
        return _unpacked(rest[1:]).decode("latin-1")
    packed, content = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
    return (_unpacked(content) if packed else content).decode("utf-8", "replace")


def _unpacked(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, LONGEST_TEXT)
    except zlib.error as error:
        raise ValueError(f"text that cannot be unpacked: {error}") from None
