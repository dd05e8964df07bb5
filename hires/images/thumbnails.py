"""Makes a small picture of a large one in bands, so that the large one is never in memory whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hires.images.boxes import Pixels
from hires.images.sources import STRIP_BYTES, ImageSource
from hires.tiling.geometry import Box

SPARE = 2
"""Blocks are averaged down to no less than this many times the thumbnail; Lanczos does the rest and keeps edges sharp."""


def eight_bits(pixels: Pixels) -> NDArray[np.uint8]:
    """Coded values as 8 bits: white stays white, others are rounded, floats are clipped to [0, 1]."""
    if pixels.dtype == np.uint16:
        half = np.minimum(~pixels, np.uint16(128))  # less where a value would leave 16 bits
        return ((pixels + half) // np.uint16(257)).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.floating):
        return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
    return pixels


def to_pillow(pixels: Pixels) -> Image.Image:
    """Pixels (H, W, 1 to 4) of any type as a PIL picture of 8 bits: L, LA, RGB or RGBA."""
    eight = eight_bits(pixels)
    return Image.fromarray(eight[..., 0] if eight.shape[2] == 1 else eight)


def thumbnail(source: ImageSource, longest: int) -> Image.Image:
    """A picture of 8 bits whose sides are at most `longest` px: the source's proportions, planes and colour profile.

    RequestError where a file turns out damaged.
    """
    size = source.size
    factor = max(1, max(size.height, size.width) // (SPARE * longest))
    scale = min(1.0, longest / max(size.height, size.width))
    width, height = (max(1, round(side * scale)) for side in (size.width, size.height))
    seen = (0.0, 0.0, size.width / factor, size.height / factor)  # of blocks, the last of which may be cut
    result = _reduced(source, factor).resize((width, height), Image.Resampling.LANCZOS, box=seen)
    if source.icc is not None:
        result.info["icc_profile"] = source.icc
    return result


def _reduced(source: ImageSource, factor: int) -> Image.Image:
    """The means over blocks of `factor` px a side."""
    size = source.size
    rows = factor * max(1, STRIP_BYTES // (factor * size.width * source.bands * source.dtype.itemsize))
    whole: Image.Image | None = None
    for top in range(0, size.height, rows):
        band = to_pillow(source.read(Box(top, 0, min(rows, size.height - top), size.width))).reduce(factor)
        if whole is None:
            whole = Image.new(band.mode, (band.width, -(-size.height // factor)))
        whole.paste(band, (0, top // factor))
    assert whole is not None, "a picture has rows"
    return whole
