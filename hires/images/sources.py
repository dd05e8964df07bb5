"""Reads pictures of any height box by box, from files or arrays.

PNG, JPEG, WebP, TIFF, GIF, HEIC, AVIF, BMP and PPM.

A file whose format goes from top to bottom is decoded once as boxes go down it; rows above the last box's top are let go, and a
box above them starts over. A tiled TIFF is read where it is asked for. A picture that its EXIF orientation turns is decoded
once into a scratch file. libvips holds whole what a format gives only whole: WebP, progressive JPEG, interlaced PNG.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from hires.errors import RequestError
from hires.images.boxes import Pixels
from hires.images.decoders import WHOLE_FORMATS, open_vips
from hires.images.tiff_check import TIFF_HEADS, check_whole_tiff
from hires.tiling.geometry import Box, Size

if TYPE_CHECKING:
    import pyvips


log = logging.getLogger(__name__)
PictureLike = str | Path | Image.Image | Pixels
STRIP_BYTES = 2**22
IN_MEMORY_BYTES = 2**25  # up to which a turned picture needs no scratch file
VALUES: dict[str, np.dtype[np.generic]] = {
    "uchar": np.dtype(np.uint8),
    "ushort": np.dtype(np.uint16),
    "float": np.dtype(np.float32),
}
PILLOWS = (b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")  # BMP, PPM and its kin
AS_THEY_ARE = ("b-w", "srgb", "rgb", "rgb16", "grey16", "scrgb", "multiband")  # others are converted to sRGB


class ImageSource:
    """A picture: `size`, `bands` (1 grey, 2 with alpha, 3 colour, 4 with alpha), `dtype` (uint8, uint16, float32), `icc`.

    `read(box)` gives (h, w, bands), turned as EXIF says, values as they are coded, alpha not multiplied in.
    """

    def __init__(self, size: Size, bands: int, dtype: np.dtype[np.generic], icc: bytes | None, name: str) -> None:
        self.size, self.bands, self.dtype, self.icc, self.name = size, bands, dtype, icc, name

    @staticmethod
    def open(source: PictureLike) -> ImageSource:
        """A file, a PIL picture or an array (H, W) or (H, W, bands). RequestError for anything else."""
        if isinstance(source, np.ndarray):
            return ArrayPicture(source)
        if isinstance(source, Image.Image):
            return ArrayPicture(_of_pil(source), source.info.get("icc_profile"))
        return _opened(Path(source))

    @property
    def has_alpha(self) -> bool:
        """Whether the last band is alpha."""
        return self.bands in (2, 4)

    def read(self, box: Box) -> Pixels:
        """The pixels of a box inside the picture, not to be written to. RequestError where the file turns out damaged."""
        raise NotImplementedError

    def close(self) -> None:
        """Let the file and any scratch go."""

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class ArrayPicture(ImageSource):
    """A picture that is in memory; boxes are views of it. Values: uint8, uint16, or float in [0, 1]."""

    def __init__(self, pixels: Pixels, icc: bytes | None = None) -> None:
        shaped = pixels[..., None] if pixels.ndim == 2 else pixels
        if pixels.dtype == np.float64:
            shaped = shaped.astype(np.float32)
        if shaped.ndim != 3 or not 1 <= shaped.shape[2] <= 4 or not shaped.size or shaped.dtype not in VALUES.values():
            raise RequestError(
                f"picture of shape {pixels.shape} and type {pixels.dtype}: give (height, width) or (height, width, 1 to 4) of "
                "uint8, uint16 or float"
            )
        super().__init__(Size(*shaped.shape[:2]), shaped.shape[2], shaped.dtype, icc, "the picture")
        self.pixels = shaped

    def read(self, box: Box) -> Pixels:
        """A view (h, w, bands) of the pixels in a box."""
        return self.pixels[box.rows, box.cols]


class TilePicture(ImageSource):
    """A libvips image that is read where it is asked for."""

    def __init__(
        self, image: pyvips.Image, icc: bytes | None, name: str, scratch: tempfile.TemporaryDirectory[str] | None = None
    ) -> None:
        super().__init__(Size(image.height, image.width), image.bands, VALUES[image.format], icc, name)
        self._image, self._scratch = image, scratch

    def read(self, box: Box) -> Pixels:
        """The pixels (h, w, bands) in a box, decoded now."""
        return _fetched(self._image, box, self.name)

    def close(self) -> None:
        """Let go of the image, and of its scratch file."""
        del self._image
        if self._scratch is not None:
            self._scratch.cleanup()


class RowPicture(ImageSource):
    """A file that is decoded from top to bottom. Rows from the top of the last box on are kept."""

    def __init__(self, path: Path, image: pyvips.Image, icc: bytes | None) -> None:
        super().__init__(Size(image.height, image.width), image.bands, VALUES[image.format], icc, str(path))
        self.path = path
        self._image: pyvips.Image | None = image
        self._strips: list[Pixels] = []
        self._top = self._bottom = 0
        self._strip = max(1, STRIP_BYTES // (self.size.width * self.bands * self.dtype.itemsize))

    def read(self, box: Box) -> Pixels:
        """The pixels (h, w, bands) in a box; above the last box the file is decoded from its top again."""
        if box.top < self._top:
            log.debug("%s: read again from the top for row %d", self.name, box.top)
            self._start_over()
        self._let_go(box.top)
        while self._bottom < box.bottom:
            rows = min(self._strip, self.size.height - self._bottom)
            strip = _fetched(self._vips(), Box(self._bottom, 0, rows, self.size.width), self.name)
            self._strips.append(strip)
            self._bottom += rows
            self._let_go(box.top)
        return self._cut(box)

    def close(self) -> None:
        """Let go of the file."""
        self._image, self._strips = None, []

    def _vips(self) -> pyvips.Image:
        if self._image is None:
            self._image = _uniform(_loaded(self.path, "sequential"), self.name)[0]
        return self._image

    def _start_over(self) -> None:
        self._image, self._strips, self._top, self._bottom = None, [], 0, 0

    def _let_go(self, top: int) -> None:
        while self._strips and self._top + len(self._strips[0]) <= top:
            self._top += len(self._strips.pop(0))

    def _cut(self, box: Box) -> Pixels:
        parts, at = [], self._top
        for strip in self._strips:
            start, stop = max(0, box.top - at), min(len(strip), box.bottom - at)
            if start < stop:
                parts.append(strip[start:stop, box.cols])
            at += len(strip)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _of_pil(picture: Image.Image) -> Pixels:
    """The pixels of a PIL picture, turned as its EXIF says, palettes expanded."""
    turned = ImageOps.exif_transpose(picture)
    if turned.mode.startswith("I;16"):
        return np.asarray(turned).astype(np.uint16)
    if turned.mode == "F":
        return np.asarray(turned)
    if turned.mode not in ("L", "LA", "RGB", "RGBA"):
        turned = turned.convert("RGBA" if turned.has_transparency_data else "L" if turned.mode == "1" else "RGB")
    return np.asarray(turned)


def _opened(path: Path) -> ImageSource:
    name = str(path)[:200]
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is not there"
        raise RequestError(f"picture {name}: {reason}; give a picture file such as a PNG or JPEG")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        check_whole_tiff(path)
    except OSError as error:
        raise _damaged(name, error) from None
    if head[:2] in PILLOWS:
        return _by_pillow(path, name)
    image, icc = _uniform(_loaded(path, "sequential"), name)
    turn = image.get("orientation") if image.get_typeof("orientation") else 1
    if turn in range(2, 9):
        return _turned(image, icc, name)
    if head in TIFF_HEADS and _is_tiled(path):
        return TilePicture(_uniform(_loaded(path, "random"), name)[0], icc, name)
    return RowPicture(path, image, icc)


def _loaded(path: Path, access: str) -> pyvips.Image:
    import pyvips

    try:
        with path.open("rb") as file:  # a TIFF's tile that cannot be decoded is black, unless libvips fails at warnings
            fail_on = "warning" if file.read(4) in TIFF_HEADS else "error"
        # revalidate: libvips otherwise gives what it last read under that name
        return open_vips(path, access=access, fail_on=fail_on, revalidate=True)
    except (OSError, pyvips.Error) as error:
        raise _damaged(str(path)[:200], error) from None


def _uniform(image: pyvips.Image, name: str) -> tuple[pyvips.Image, bytes | None]:
    """The same picture with values of a type of ours, in grey or RGB, and its colour profile."""
    icc: bytes | None = image.get("icc-profile-data") if image.get_typeof("icc-profile-data") else None
    if image.interpretation not in AS_THEY_ARE:
        image, icc = image.colourspace("srgb"), None
    if image.format == "double":
        image = image.cast("float")
    if image.format not in VALUES or not 1 <= image.bands <= 4:
        raise RequestError(f"picture {name}: {image.bands} bands of {image.format}; give 1 to 4 of 8 bits, 16 bits or float32")
    return image, icc


def _turned(image: pyvips.Image, icc: bytes | None, name: str) -> TilePicture:
    """A picture turned upright: its decoded pixels lie in memory or in a scratch file, from where any box can be read."""
    import pyvips

    scratch: tempfile.TemporaryDirectory[str] | None = None
    try:
        if image.width * image.height * image.bands * VALUES[image.format].itemsize <= IN_MEMORY_BYTES:
            whole = image.copy_memory()
        else:
            scratch = tempfile.TemporaryDirectory(prefix="hires-", ignore_cleanup_errors=True)
            file = str(Path(scratch.name) / "upright.v")
            image.write_to_file(file)
            whole = pyvips.Image.new_from_file(file, access="random", revalidate=True)
        return TilePicture(whole.autorot(), icc, name, scratch)
    except pyvips.Error as error:
        if scratch is not None:
            scratch.cleanup()
        raise _damaged(name, error) from None


def _by_pillow(path: Path, name: str) -> ArrayPicture:
    """A format that libvips is built without, read whole."""
    try:
        with Image.open(path, formats=WHOLE_FORMATS) as picture:
            return ArrayPicture(_of_pil(picture), picture.info.get("icc_profile"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _damaged(name, error) from None


def _is_tiled(path: Path) -> bool:
    from tifffile import TiffFile, TiffFileError

    try:
        with TiffFile(path) as file:
            return bool(file.pages[0].is_tiled)
    except (TiffFileError, IndexError, ValueError):
        return False


def _fetched(image: pyvips.Image, box: Box, name: str) -> Pixels:
    import pyvips

    try:
        content = pyvips.Region.new(image).fetch(box.left, box.top, box.width, box.height)
    except pyvips.Error as error:
        raise _damaged(name, error) from None
    values: Pixels = np.frombuffer(content, dtype=VALUES[image.format])
    return values.reshape(box.height, box.width, image.bands)


def _damaged(name: str, error: Exception) -> RequestError:
    reason = " ".join(str(error).split())[:200]
    return RequestError(f"picture {name}: {reason}; give a picture file such as a PNG or JPEG")
