"""Sizes as users give them: 'WIDTHxHEIGHT', a pair, or a Size."""

from __future__ import annotations

import operator
import re

from hires.errors import RequestError, SizeError
from hires.tiling.geometry import Size

LARGEST_SIDE_PX = 131_072
LARGEST_AREA_PX = 2**32
SMALLEST_SIDE_PX = 16


def parse_size(text: str) -> Size:
    """'WIDTHxHEIGHT' (x, X, × or *) or one number for a square, as a Size; SizeError with the next move otherwise."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(?:[xX×*]\s*(\d{1,9})\s*)?", text)
    if match is None:
        raise SizeError(f"size {text!r}: give WIDTHxHEIGHT in pixels, such as 4096x4096")
    width = int(match[1])
    return check_size(Size(int(match[2] or width), width))


SizeLike = str | tuple[int, int] | Size


def as_size(size: SizeLike) -> Size:
    """A Size from "4096x4096" (WIDTHxHEIGHT), a pair (width, height) or a Size; SizeError for anything else."""
    if isinstance(size, str):
        return parse_size(size)
    if isinstance(size, Size):
        return check_size(size)
    try:
        width, height = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise SizeError(f"size {size!r}: give 'WIDTHxHEIGHT' or a pair of whole numbers (width, height)") from None
    return check_size(Size(height, width))


def check_size(size: Size) -> Size:
    """The same size; SizeError where it is too small or too large to render."""
    if min(size.height, size.width) < SMALLEST_SIDE_PX:
        raise SizeError(f"size {size}: each side must be at least {SMALLEST_SIDE_PX} px, such as 1024x1024")
    if max(size.height, size.width) > LARGEST_SIDE_PX:
        raise SizeError(f"size {size}: a side may be {LARGEST_SIDE_PX} px at most; render smaller and enlarge")
    if size.area > LARGEST_AREA_PX:
        raise SizeError(f"size {size}: {size.area / 1e6:.0f} megapixels are over the limit of {LARGEST_AREA_PX / 1e6:.0f}")
    return size


LARGEST_CROP_PX = 65_536


def as_crop(crop: str | tuple[int, int]) -> tuple[int, int]:
    """'X,Y' or a pair (x, y) in px, from 0 on. RequestError for anything else."""
    parts: object = crop.split(",") if isinstance(crop, str) else crop
    try:
        x, y = (int(part) if isinstance(part, str) else operator.index(part) for part in parts)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise RequestError(f"crop {crop!r}: give X,Y in pixels, such as 0,0") from None
    if not (0 <= x <= LARGEST_CROP_PX and 0 <= y <= LARGEST_CROP_PX):
        raise RequestError(f"crop {x},{y}: give each from 0 to {LARGEST_CROP_PX}")
    return x, y
