"""Pictures in and out: read whole, written from bands as one whole file, or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from hires.errors import OutputError, RequestError, WriteError
from hires.resolution import cover
from hires.tiling.geometry import Size

SUFFIXES = (".png",)


def check_output(path: Path, overwrite: bool) -> Path:
    """The path, if a file can be written there. OutputError says what is in the way, before any work is done."""
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(f"output {path}: the name must end in .png")
    try:
        return _check_place(path, overwrite)
    except OSError as error:
        raise OutputError(f"output {str(path)[:120]}: cannot be written ({error.strerror}); give another -o") from None


def _check_place(path: Path, overwrite: bool) -> Path:
    if path.is_dir():
        raise OutputError(f"output {path}: is a folder; name a file in it, such as {path / 'picture.png'}")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"output {path}: the folder {folder} does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"output {path}: the folder {folder} is not writable")
    if path.exists() and not overwrite:
        raise OutputError(f"output {path}: exists already; give --overwrite or another name")
    return path


def to_uint8(band: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(h, w, 3) in [-1, 1] to rounded 8-bit values."""
    scaled: NDArray[np.float32] = np.clip(band * np.float32(127.5) + np.float32(127.5), 0, 255)
    return (scaled + np.float32(0.5)).astype(np.uint8)


class PictureSink:
    """Collects bands (band_h, W, 3), float32 in [-1, 1] or 8-bit, into pixels cut to `size`; the whole picture is held."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.pixels: NDArray[np.uint8] = np.zeros((size.height, size.width, 3), dtype=np.uint8)
        self.rows = 0

    def write(self, band: NDArray[np.float32] | NDArray[np.uint8]) -> None:
        """Append a band; rows and columns beyond the picture are cut off."""
        keep = min(band.shape[0], self.size.height - self.rows)
        if keep > 0:
            part: Any = band[:keep, : self.size.width]
            self.pixels[self.rows : self.rows + keep] = part if part.dtype == np.uint8 else to_uint8(part)
            self.rows += keep

    def finished(self) -> NDArray[np.uint8]:
        """The picture; an invariant that every row came."""
        assert self.rows == self.size.height, f"{self.rows} of {self.size.height} rows were written"
        return self.pixels


def save_png(
    path: Path, pixels: NDArray[np.uint8], text: Mapping[str, str], overwrite: bool, within: Path | None = None
) -> None:
    """Write pixels (H, W, 3) with text chunks. The file appears whole or not at all; WriteError if the disk refuses.

    within: a folder for the unfinished file that is cleared after a kill, such as a journal's.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value) if not value.isascii() else info.add_text(key, value)
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=_place(path, within))
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(pixels).save(file, format="PNG", pnginfo=info, compress_level=4)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        if path.exists() and not overwrite:
            raise OutputError(f"output {path}: appeared while rendering; give --overwrite or another name")
        temporary.replace(path)
        temporary = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(f"output {path}: {reason}; nothing was written; make room or give another -o") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(path) as picture:
        picture.load()
        chunks: dict[str, Any] = getattr(picture, "text", {})
        return {key: str(value) for key, value in chunks.items()}


def read_picture(source: str | Path | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture as (H, W, 3) uint8, turned as its EXIF orientation says, transparency laid on white.

    RequestError for a file that is none, and for an array of another shape or type.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise RequestError(f"picture of shape {source.shape} and type {source.dtype}: give (height, width, 3) uint8")
        return source
    if isinstance(source, Image.Image):
        return _as_rgb(source)
    try:
        with Image.open(source) as opened:
            return _as_rgb(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"picture {str(source)[:200]}: {error}; give a picture file such as a PNG or JPEG") from None


def _as_rgb(picture: Image.Image) -> NDArray[np.uint8]:
    turned = ImageOps.exif_transpose(picture)
    if turned.has_transparency_data:
        layer = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(turned.convert("RGB"))


def fitted(pixels: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """A picture (H, W, 3) that fills `size` exactly: resized by Lanczos, what sticks out on one axis cut off evenly."""
    source = Size(*pixels.shape[:2])
    if source == size:
        return pixels
    resized, box = cover(source, size)
    large = Image.fromarray(pixels).resize((resized.width, resized.height), Image.Resampling.LANCZOS)
    return np.asarray(large.crop((box.left, box.top, box.left + box.width, box.top + box.height)))


def on_canvas(pixels: NDArray[np.uint8], size: Size, canvas: Size) -> NDArray[np.uint8]:
    """A picture that fills `size`, its last row and column repeated up to the canvas it is cut from in the end."""
    filled = fitted(pixels, size)
    return np.pad(filled, ((0, canvas.height - size.height), (0, canvas.width - size.width), (0, 0)), mode="edge")
