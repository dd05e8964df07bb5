"""Writes pictures row by row: PNG, BigTIFF, JPEG, WebP, or an array.

Host memory does not grow with the height.
"""

from __future__ import annotations

import contextlib
import json
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

import numpy as np
from numpy.typing import DTypeLike

from hires.errors import RequestError, WriteError
from hires.images.atomic_file import Unfinished, refusing
from hires.images.boxes import Pixels
from hires.images.formats import DESCRIPTION, JPEG, PNG, TIFF, Format, check_fits, check_output
from hires.images.png import PngWriter
from hires.images.tiff import TiffWriter, pyramid
from hires.tiling.geometry import Size

log = logging.getLogger(__name__)
QUALITY = 95  # of JPEG and WebP, in their own scales
LARGEST_EXIF = 65_500  # bytes that a JPEG's one marker holds


class Encoder(Protocol):
    """What a format does with rows."""

    def write(self, rows: Pixels) -> None:
        """Append rows (n, W, bands)."""
        ...

    def finish(self, text: Mapping[str, str]) -> None:
        """Write what is left, with further text by key."""
        ...

    def abort(self) -> None:
        """Stop and abandon what is written."""
        ...


class ImageSink:
    """A picture of known size that is given from top to bottom: `write(rows)`, then `close()`, or `abort()`.

    A file appears whole at `close`, by a rename, or not at all. As a context manager it aborts where an error leaves the
    block, and closes otherwise.
    """

    def __init__(
        self, encoder: Encoder, size: Size, bands: int, dtype: np.dtype[np.generic], unfinished: Unfinished | None
    ) -> None:
        self.size, self.bands, self.dtype, self.rows = size, bands, dtype, 0
        self._encoder, self._unfinished, self._open = encoder, unfinished, True

    @classmethod
    def open(
        cls,
        path: str | Path | Unfinished,
        size: Size,
        bands: int = 3,
        dtype: DTypeLike = np.uint8,
        icc: bytes | None = None,
        metadata: Mapping[str, str] | None = None,
        *,
        overwrite: bool = False,
    ) -> ImageSink:
        """A sink to a file by its name: .png (8, 16 bits), .tif (BigTIFF, tiled, with a pyramid; also float32), .jpg, .webp.

        Args:
            path: where the file appears, or an unfinished file that becomes it.
            size: height and width in pixels.
            bands: 1 grey, 2 grey and alpha, 3 colour, 4 colour and alpha (not multiplied in).
            dtype: the type of the values.
            icc: the colour profile; None says sRGB (nothing for grey outside PNG).
            metadata: text by key; what `close` is given comes on top.
            overwrite: whether a file that is there is replaced; an unfinished file says so itself.

        Raises:
            OutputError: the format cannot hold the picture, or the place cannot be written. WriteError: the disk refuses.
        """
        kind, unfinished = np.dtype(dtype), path if isinstance(path, Unfinished) else None
        try:
            place = check_output(Path(path), overwrite) if not isinstance(path, Unfinished) else path.path
            fmt = check_fits(place, size, bands, kind)
            unfinished = unfinished or Unfinished(place, overwrite)
            with refusing(place):
                encoder = _encoder(fmt, unfinished, _Picture(size, bands, kind, icc, dict(metadata or {})))
        except BaseException:
            if unfinished is not None:
                unfinished.discard()
            raise
        return cls(encoder, size, bands, kind, unfinished)

    def write(self, rows: Pixels) -> None:
        """Append rows (n, W, bands) of the sink's type. WriteError where the disk refuses; nothing is left behind then."""
        assert self._open, "a sink that is closed takes no rows"
        expected = (self.size.width, self.bands)
        if rows.shape[1:] != expected or rows.dtype != self.dtype or self.rows + len(rows) > self.size.height:
            raise ValueError(
                f"rows {rows.shape} of {rows.dtype} after {self.rows}: the picture is {self.size}, {self.bands} bands of "
                f"{self.dtype}"
            )
        self._doing(lambda: self._encoder.write(rows))
        self.rows += len(rows)

    def put(self, rows: Pixels) -> None:
        """Append rows of a canvas that the picture is cut from: what lies beyond its size is left out."""
        keep = min(len(rows), self.size.height - self.rows)
        if keep > 0:
            self.write(rows[:keep, : self.size.width])

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Finish the picture, with more text. An invariant that every row came."""
        if not self._open:
            return
        assert self.rows == self.size.height, f"{self.rows} of {self.size.height} rows were written"
        self._doing(lambda: self._encoder.finish(dict(metadata or {})))
        self._open = False
        if self._unfinished is not None:
            try:
                self._unfinished.commit()
            finally:
                self._unfinished.discard()

    def abort(self) -> None:
        """Leave nothing behind. Does nothing after `close`."""
        if self._open:
            self._open = False
            self._encoder.abort()
            if self._unfinished is not None:
                self._unfinished.discard()

    def __enter__(self) -> ImageSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _doing(self, work: Callable[[], None]) -> None:
        try:
            if self._unfinished is None:
                work()
            else:
                with refusing(self._unfinished.path):
                    work()
        except BaseException:
            self.abort()
            raise


class ArraySink(ImageSink):
    """A sink into `pixels` (H, W, bands): an array of its own, or one that is given, such as a memory-mapped file."""

    def __init__(self, size: Size, bands: int = 3, dtype: DTypeLike = np.uint8, pixels: Pixels | None = None) -> None:
        shape = (size.height, size.width, bands)
        self.pixels: Pixels = np.zeros(shape, dtype=dtype) if pixels is None else pixels
        if self.pixels.shape != shape:
            raise RequestError(f"array of shape {self.pixels.shape} for a picture of {shape}: give one of that shape")
        self.text: dict[str, str] = {}
        super().__init__(_IntoArray(self), size, bands, self.pixels.dtype, None)


@dataclass(slots=True)
class _IntoArray:
    sink: ArraySink

    def write(self, rows: Pixels) -> None:
        self.sink.pixels[self.sink.rows : self.sink.rows + len(rows)] = rows

    def finish(self, text: Mapping[str, str]) -> None:
        self.sink.text |= text

    def abort(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Picture:
    size: Size
    bands: int
    dtype: np.dtype[np.generic]
    icc: bytes | None
    text: dict[str, str]


def _encoder(fmt: Format, unfinished: Unfinished, picture: _Picture) -> Encoder:
    if fmt is PNG:
        return _Png(unfinished.temporary.open("wb"), picture)
    if fmt is TIFF:
        return _Tiff(unfinished, picture)
    return _Whole(fmt, unfinished, picture)


class _Png:
    def __init__(self, file: IO[bytes], picture: _Picture) -> None:
        self.file = file
        self.writer = PngWriter(file, picture.size, picture.bands, picture.dtype, picture.icc)
        self.writer.text(picture.text)

    def write(self, rows: Pixels) -> None:
        self.writer.write(rows)

    def finish(self, text: Mapping[str, str]) -> None:
        self.writer.finish(text)
        self.file.close()

    def abort(self) -> None:
        self.writer.abort()
        with contextlib.suppress(OSError):  # a full disk refuses what is buffered once more
            self.file.close()


class _Tiff:
    def __init__(self, unfinished: Unfinished, picture: _Picture) -> None:
        scratch = [unfinished.scratch() for _ in pyramid(picture.size)]
        icc = tagged(picture)
        self.text = picture.text
        self.writer = TiffWriter(unfinished.temporary, picture.size, picture.bands, picture.dtype, icc, scratch)

    def write(self, rows: Pixels) -> None:
        self.writer.write(rows)

    def finish(self, text: Mapping[str, str]) -> None:
        self.writer.finish(self.text | dict(text))

    def abort(self) -> None:
        self.writer.abort()


@dataclass
class _Whole:
    """JPEG and WebP by libvips, which pulls a picture and cannot be fed: rows go to a raw scratch file that it reads."""

    fmt: Format
    unfinished: Unfinished
    picture: _Picture
    raw: Path = field(init=False)
    file: IO[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.raw = self.unfinished.scratch()
        self.file = self.raw.open("wb")

    def write(self, rows: Pixels) -> None:
        self.file.write(np.ascontiguousarray(rows).data)

    def finish(self, text: Mapping[str, str]) -> None:
        import pyvips

        self.file.close()
        size, bands = self.picture.size, self.picture.bands
        image = pyvips.Image.rawload(str(self.raw), size.width, size.height, bands, access="sequential", revalidate=True)
        image = image.copy(interpretation="b-w" if bands < 3 else "srgb")
        icc, blob = tagged(self.picture), pyvips.GValue.blob_type
        if icc is not None:
            image.set_type(blob, "icc-profile-data", icc)
        exif = _exif(self.picture.text | dict(text), self.fmt)
        if exif is not None:
            image.set_type(blob, "exif-data", exif)
        try:
            if self.fmt is JPEG:
                image.jpegsave(str(self.unfinished.temporary), Q=QUALITY, subsample_mode="off", optimize_coding=True)
            else:
                image.webpsave(str(self.unfinished.temporary), Q=QUALITY, smart_subsample=True)
        except pyvips.Error as error:
            reason = " ".join(str(error).split())[:200]
            raise WriteError(
                f"output {self.unfinished.path}: {reason}; nothing was written; make room or give another `output`"
            ) from None

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()


def tagged(picture: _Picture) -> bytes | None:
    """The profile that goes into a file: the one given, else sRGB for colour."""
    return picture.icc if picture.icc is not None or picture.bands < 3 else srgb_profile()


def srgb_profile() -> bytes:
    """An ICC profile of sRGB (IEC 61966-2-1), the same bytes at any time: LittleCMS writes the time of day into its header."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


def _exif(text: Mapping[str, str], fmt: Format) -> bytes | None:
    """The text as one JSON document in ImageDescription; in a JPEG the longest values go until the rest fits its 64 KiB."""
    from PIL import Image

    texts = dict(text)
    while texts:
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(texts)
        content = exif.tobytes()
        if fmt is not JPEG or len(content) <= LARGEST_EXIF:
            return content
        longest = max(texts, key=lambda key: len(texts[key]))
        log.warning("%s has no room in a JPEG's metadata and is left out; a PNG or TIFF keeps it", longest)
        del texts[longest]
    return None
