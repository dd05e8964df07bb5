"""Checks, decodes, stores, resizes and masks the pictures of requests."""

from __future__ import annotations

import base64
import binascii
import io
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageFilter, ImageOps

from hires.errors import RequestError
from hires.server.settings import Limits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
LONGEST_SHOWN = 60
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""


Sent = tuple[str, str | bytes]
"""What a picture is called in errors, and its file, in base64 or as bytes."""


def check_sum(pictures: Iterable[Sent], limits: Limits) -> None:
    """RequestError where the pictures of a request have too many pixels, each or together; their headers alone are read."""
    pixels = 0
    for what, sent in pictures:
        content = sent if isinstance(sent, bytes) else _decode(sent, what)
        with _refusing(what), _opened(content, limits, what) as picture:
            pixels += picture.width * picture.height
        if pixels > limits.request_pixels:
            most = f"{limits.request_pixels / 1e6:.0f} megapixels"
            raise RequestError(
                f"{what}: with those before it is over the limit of {most} in one request; send fewer or smaller"
            )


def from_base64(text: str, limits: Limits, what: str = "image") -> Image.Image:
    """A picture from base64, or from 'data:image/...;base64,'. RequestError says what is wrong; nothing is fetched."""
    return from_bytes(_decode(text, what), limits, what)


def _decode(text: str, what: str) -> bytes:
    if text[:8].lower().startswith(("http:", "https:", "file:", "ftp:")):
        raise RequestError(f"{what} {_short(text)}: addresses are not loaded; send the picture itself in base64")
    if text.startswith("data:"):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RequestError(f"{what} {_short(head)}: give 'data:image/png;base64,' and the picture")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{what} {_short(text)!r}: is no base64 ({error}); send a PNG, JPEG or WebP in base64") from None


def from_bytes(content: bytes, limits: Limits, what: str = "image") -> Image.Image:
    """A picture file in memory, decoded. RequestError for bytes that are no picture, are damaged, or have too many pixels."""
    with _refusing(what):
        picture = _opened(content, limits, what)
        picture.load()
    return picture


def _opened(content: bytes, limits: Limits, what: str) -> Image.Image:
    """A picture whose header was read, and its size checked."""
    if not content:
        raise RequestError(f"{what}: is empty; send a PNG, JPEG or WebP")
    picture = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(picture.size, limits, what)
    return picture


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """RequestError for whatever Pillow finds wrong with a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
            yield
    except Image.DecompressionBombError as error:
        raise RequestError(f"{what}: {error}; send a smaller one") from None
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise RequestError(f"{what}: cannot be read ({_short(str(error))}); send a PNG, JPEG or WebP") from None


def _check_size(size: tuple[int, int], limits: Limits, what: str) -> None:
    width, height = size
    if not width * height:
        raise RequestError(f"{what} of {width}x{height}: has no pixels; send another")
    if width * height > limits.input_pixels or max(size) > limits.side_px:
        most = f"{limits.input_pixels / 1e6:.0f} megapixels and {limits.side_px} px a side"
        raise RequestError(f"{what} of {width}x{height}: is over the limit of {most}; send a smaller one")


def turn_upright(picture: Image.Image) -> Image.Image:
    """The picture, itself turned as its EXIF orientation says, in RGB or RGBA."""
    ImageOps.exif_transpose(picture, in_place=True)
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def store_png(picture: Image.Image, folder: Path, name: str) -> str:
    """Write a picture as a PNG file of that name into a folder, and return the name."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = (
        picture
        if picture.mode in ("L", "LA", "RGB", "RGBA", "I;16")
        else picture.convert("L" if picture.mode == "1" else "RGB")
    )
    plain.save(folder / name, format="PNG", compress_level=1, icc_profile=picture.info.get("icc_profile"))
    return name


def png_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """(h, w, 3) pixels as a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG", compress_level=1)
    return content.getvalue()


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links. FileExistsError where that name exists."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(target) from None
        shutil.copyfile(source, target)


def resize(picture: Image.Image, width: int, height: int, mode: int) -> Image.Image:
    """The picture at exactly width x height. A1111's resize_mode: 0 stretch, 1 crop, 2 fill with the edges' colours, 3 as 0."""
    if picture.size == (width, height):
        return picture
    lanczos = Image.Resampling.LANCZOS
    if mode == 1:
        return ImageOps.fit(picture, (width, height), lanczos)
    if mode == 2:
        inner = ImageOps.contain(picture, (width, height), lanczos)
        left, top = (width - inner.width) // 2, (height - inner.height) // 2
        canvas = Image.new(picture.mode, (width, height))
        canvas.paste(inner, (left, top))
        return _extend_edges(canvas, (left, top, left + inner.width, top + inner.height))
    return picture.resize((width, height), lanczos)


def _extend_edges(picture: Image.Image, box: Box) -> Image.Image:
    """Paint what lies outside a box with the nearest row or column inside it."""
    left, top, right, bottom = box
    width, height = picture.size
    for source, target in (
        ((left, top, left + 1, bottom), (0, top, left, bottom)),
        ((right - 1, top, right, bottom), (right, top, width, bottom)),
        ((0, top, width, top + 1), (0, 0, width, top)),
        ((0, bottom - 1, width, bottom), (0, bottom, width, height)),
    ):
        size = (target[2] - target[0], target[3] - target[1])
        if min(size) > 0:
            picture.paste(picture.crop(source).resize(size, Image.Resampling.NEAREST), target[:2])
    return picture


def mask_of(picture: Image.Image, size: tuple[int, int], blur: float, invert: bool) -> Image.Image:
    """A mask in grey at that size, white where to draw; blurred by `blur` px."""
    grey = picture.convert("L").resize(size, Image.Resampling.BILINEAR)
    grey = ImageOps.invert(grey) if invert else grey
    return grey.filter(ImageFilter.GaussianBlur(blur)) if blur > 0 else grey


def box_around(mask: Image.Image, padding: int, width: int, height: int) -> Box | None:
    """The box around a mask's white and a padding, widened to the aspect width : height; None where nothing is white."""
    inner = mask.point([0] * 1 + [255] * 255).getbbox()
    if inner is None:
        return None
    left, top = max(0, inner[0] - padding), max(0, inner[1] - padding)
    right, bottom = min(mask.width, inner[2] + padding), min(mask.height, inner[3] + padding)
    across, down = right - left, bottom - top
    if across * height < down * width:
        across = min(mask.width, round(down * width / height))
    else:
        down = min(mask.height, round(across * height / width))
    left = min(max(0, (left + right - across) // 2), mask.width - across)
    top = min(max(0, (top + bottom - down) // 2), mask.height - down)
    return left, top, left + across, top + down


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."
