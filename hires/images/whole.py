"""Reads and writes whole pictures.

`ImageSource` and `ImageSink` read and write them part by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hires.errors import OutputError, RequestError
from hires.images.atomic_file import Unfinished
from hires.images.boxes import unit
from hires.images.decoders import PILLOW_FORMATS
from hires.images.formats import check_output
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.images.tiff_check import check_whole_tiff
from hires.tiling.geometry import Box, Size, cover


def check_png(path: Path, overwrite: bool) -> Path:
    """As `check_output`, for what is drawn as a PNG and nothing else."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"output {path}: the name must end in .png")
    return check_output(path, overwrite)


def to_uint8(band: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(h, w, 3) in [-1, 1] to rounded 8-bit values."""
    scaled: NDArray[np.float32] = np.clip(band * np.float32(127.5) + np.float32(127.5), 0, 255)
    return (scaled + np.float32(0.5)).astype(np.uint8)


def save_png(
    path: Path, pixels: NDArray[np.uint8], text: Mapping[str, str], overwrite: bool, within: Path | None = None
) -> None:
    """Write pixels (H, W, 3) with text chunks. The file appears whole or not at all; WriteError if the disk refuses.

    within: a folder for the unfinished file that is cleared after a kill, such as a journal's.
    """
    size = Size(*pixels.shape[:2])
    place = path if within is None else Unfinished(check_output(path, overwrite), overwrite, within)
    with ImageSink.open(place, size, metadata=text, overwrite=overwrite) as sink:
        sink.write(pixels)


def read_picture(source: str | Path | Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture as (H, W, 3) uint8, turned as its EXIF orientation says, transparency laid on white.

    RequestError for a file that is no picture, and for an array of another shape or type.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise RequestError(f"picture of shape {source.shape} and type {source.dtype}: give (height, width, 3) uint8")
        return source
    if isinstance(source, Image.Image):
        return _as_rgb(source)
    try:
        check_whole_tiff(Path(source))
        with Image.open(source, formats=PILLOW_FORMATS) as opened:
            deep = opened.mode.startswith(("I", "F"))  # Pillow would clip them to 8 bits
            return _by_source(Path(source)) if deep else _as_rgb(opened)
    except UnidentifiedImageError:  # 16 bits of colour in a TIFF, HEIC, AVIF
        return _by_source(Path(source))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"picture {str(source)[:200]}: {error}; give a picture file such as a PNG or JPEG") from None


def _by_source(path: Path) -> NDArray[np.uint8]:
    """A picture that Pillow does not know, by `ImageSource`; no larger than Pillow takes."""
    with ImageSource.open(path) as source:
        size, most = source.size, Image.MAX_IMAGE_PIXELS
        if most is not None and size.area > 2 * most:
            raise RequestError(f"picture {path}: {size} is over {2 * most / 1e6:.0f} megapixels; give a smaller one")
        values = unit(source.read(Box(0, 0, size.height, size.width)))
        if source.has_alpha:
            values = values[..., :-1] * values[..., -1:] + (1 - values[..., -1:])
    eight = (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(eight, (size.height, size.width, 3)))


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
