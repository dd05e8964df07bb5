"""The formats that pictures are written in, and what each can hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from hires.errors import OutputError, RequestError
from hires.images.atomic_file import check_place
from hires.images.decoders import open_vips
from hires.images.png import LARGEST_SIDE, SIGNATURE, read_png_text
from hires.tiling.geometry import Size

DESCRIPTION = 0x010E  # EXIF and TIFF: ImageDescription
UINT8, UINT16, FLOAT32 = np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a file format can hold."""

    title: str
    """Its name for people."""
    largest: int
    """The largest side in pixels."""
    dtypes: tuple[np.dtype[np.generic], ...]
    """The types of values."""
    bands: tuple[int, ...] = (1, 2, 3, 4)
    """The numbers of bands."""


PNG = Format(title="PNG", largest=LARGEST_SIDE, dtypes=(UINT8, UINT16))
TIFF = Format(title="TIFF", largest=2**31 - 1, dtypes=(UINT8, UINT16, FLOAT32))
JPEG = Format(title="JPEG", largest=65_535, dtypes=(UINT8,), bands=(1, 3))
WEBP = Format(title="WebP", largest=16_383, dtypes=(UINT8,))
FORMATS = {".png": PNG, ".tif": TIFF, ".tiff": TIFF, ".jpg": JPEG, ".jpeg": JPEG, ".webp": WEBP}


def format_of(path: Path) -> Format:
    """The format of a name. OutputError for one that is not written."""
    known = FORMATS.get(path.suffix.lower())
    if known is None:
        raise OutputError(f"output {path}: the name must end in {', '.join(FORMATS)}")
    return known


def check_output(path: Path, overwrite: bool) -> Path:
    """The path, if a picture can be written there. OutputError says what is in the way, before any work is done."""
    format_of(path)
    return check_place(path, overwrite)


def check_fits(path: Path, size: Size, bands: int = 3, dtype: DTypeLike = np.uint8) -> Format:
    """The format of a name. OutputError where it cannot hold such a picture, with one that can."""
    fmt, kind = format_of(path), np.dtype(dtype)
    if max(size.height, size.width) > fmt.largest:
        raise OutputError(
            f"output {path}: {size} is over {fmt.title}'s limit of {fmt.largest} px a side; give a name in .png or .tif"
        )
    if bands not in fmt.bands:
        raise OutputError(f"output {path}: {fmt.title} has no transparency; give a name in .png, .webp or .tif")
    if kind not in fmt.dtypes:
        held = " or ".join(known.name for known in fmt.dtypes)
        raise OutputError(f"output {path}: {fmt.title} holds {held}, not {kind.name}; give a name in .tif, or other values")
    return fmt


def read_text(path: Path) -> dict[str, str]:
    """The text that a picture file brings: a PNG's chunks, what `ImageSink` wrote elsewhere. Pixels are not read.

    RequestError for a file that is no picture.
    """
    try:
        with path.open("rb") as file:
            png = file.read(8) == SIGNATURE
        return read_png_text(path) if png else _described(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"picture {str(path)[:200]}: {error}; give a picture file such as a PNG or JPEG") from None


def _described(path: Path) -> dict[str, str]:
    import pyvips
    from PIL import Image

    try:
        image = open_vips(path, revalidate=True)
    except pyvips.Error as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    if image.get_typeof("image-description"):
        return _document(image.get("image-description"))
    if image.get_typeof("exif-data"):
        exif = Image.Exif()
        exif.load(image.get("exif-data"))
        return _document(str(exif.get(DESCRIPTION, "")))
    return {}


def _document(text: str) -> dict[str, str]:
    try:
        decoded = json.loads(text.rstrip("\0"))
    except ValueError:
        return {"Description": text} if text else {}
    return {str(key): str(value) for key, value in decoded.items()} if isinstance(decoded, dict) else {"Description": text}
