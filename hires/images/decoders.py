"""Chooses the decoder of a picture file by its first bytes.

Nothing else is opened, whatever its name: Pillow would start Ghostscript for an EPS, and libvips draws an SVG or PDF with the
local files that it names.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from hires.errors import RequestError
from hires.images.tiff_check import TIFF_HEADS

if TYPE_CHECKING:
    import pyvips


READ = "PNG, JPEG, WebP, TIFF, GIF, HEIC, AVIF, BMP, PPM"
WHOLE_FORMATS = ("BMP", "PPM")  # by Pillow: libvips is built without them
PILLOW_FORMATS = (
    *("PNG", "JPEG", "WEBP", "TIFF", "GIF", *WHOLE_FORMATS),
    *(("AVIF",) if importlib.util.find_spec("PIL.AvifImagePlugin") else ()),
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"avif", b"avis")


def vips_loader(head: bytes) -> str | None:
    """The libvips loader of a file that begins with these bytes (12 or more); None for a format that is not read by it."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "pngload"
    if head.startswith(b"\xff\xd8"):
        return "jpegload"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gifload"
    if head.startswith(TIFF_HEADS):
        return "tiffload"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webpload"
    return "heifload" if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS else None


def open_vips(path: Path, **options: str | int | bool) -> pyvips.Image:
    """A file by the libvips loader of its own format. RequestError for another format, pyvips.Error for a damaged file.

    options: of that loader, such as access="sequential", fail_on="error", page=1.
    """
    import pyvips

    with path.open("rb") as file:
        loader = vips_loader(file.read(12))
    if loader is None:
        raise RequestError(f"picture {str(path)[:200]}: is not in a known file format; give a picture file such as {READ}")
    image: pyvips.Image = pyvips.Operation.call(loader, str(path), **options)
    return image
