"""Reads pictures box by box, so that measuring needs no second copy.

Imports numpy and Pillow only.

A source gives integers that fill their type (uint8, uint16) or floats in [0, 1], sRGB coded. Whoever measures walks it in bands
of at most `BAND_VALUES` pixels from top to bottom, once per measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hires.errors import RequestError
from hires.tiling.geometry import Box, Size, bands

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Pixels = NDArray[Any]
"""(h, w, bands) of uint8, uint16 or float32."""
REC709 = np.asarray((0.2126, 0.7152, 0.0722), dtype=np.float32)
BAND_VALUES = 2**19  # pixels of a band: 6 MiB of float32 colour


class BoxSource(Protocol):
    """A picture that is read a box at a time."""

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        ...

    def read(self, box: Box) -> Pixels:
        """The pixels of a box inside the picture, (h, w, 3) uint8, uint16 or float in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class ArraySource:
    """A picture that is in memory, (H, W, 3) uint8, uint16 or float in [0, 1]; boxes are views of it.

    RequestError for an array of another shape or type.
    """

    pixels: Pixels

    def __post_init__(self) -> None:
        kind, shape = self.pixels.dtype, self.pixels.shape
        known = kind in (np.uint8, np.uint16) or np.issubdtype(kind, np.floating)
        if len(shape) != 3 or shape[2] != 3 or not self.pixels.size or not known:
            raise RequestError(f"picture of shape {shape} and type {kind}: give (height, width, 3) uint8, uint16 or float")

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return Size(*self.pixels.shape[:2])

    def read(self, box: Box) -> Pixels:
        """A view (h, w, 3) of the pixels in a box."""
        return self.pixels[box.rows, box.cols]


@dataclass(frozen=True, slots=True)
class LanczosSource:
    """A small picture (h, w, 3) uint8 as its Lanczos enlargement to `size`, of which only what is read is ever made."""

    base: NDArray[np.uint8]
    size: Size

    def read(self, box: Box) -> NDArray[np.uint8]:
        """The enlarged pixels (h, w, 3) in a box."""
        down, across = self.base.shape[0] / self.size.height, self.base.shape[1] / self.size.width
        part = box.left * across, box.top * down, box.right * across, box.bottom * down
        picture = Image.fromarray(self.base)
        return np.asarray(picture.resize((box.width, box.height), Image.Resampling.LANCZOS, box=part))


def bits_of(source: BoxSource) -> int | None:
    """Bits per channel, 8 or 16; None for floats."""
    kind = source.read(Box(0, 0, 1, 1)).dtype
    return 8 * kind.itemsize if np.issubdtype(kind, np.integer) else None


def white_code(kind: np.dtype[np.generic]) -> int:
    """What white is coded as: 255, 65535, or 1 for floats."""
    return 2 ** (8 * kind.itemsize) - 1 if np.issubdtype(kind, np.integer) else 1


def unit(pixels: Pixels) -> Floats:
    """Coded values in [0, 1], float32, of the same shape."""
    scaled: Floats = pixels.astype(np.float32) * np.float32(1 / white_code(pixels.dtype))
    return scaled


def luma(picture: Pixels) -> Floats:
    """Rec. 709 luma (H, W) in [0, 1] of a picture (H, W, 3): the weights on the coded values."""
    scale = np.float32(1 / white_code(picture.dtype))
    result: Floats = (picture.astype(np.float32) @ REC709) * scale
    return result


def band_boxes(size: Size, before: int = 0, after: int = 0) -> Iterator[tuple[Box, int]]:
    """Bands that cover the picture from top to bottom, and how many of their rows come before the band itself.

    Each has up to `before` and `after` more rows, where there are any.
    """
    for top, bottom in bands(size.height, max(1, BAND_VALUES // size.width)):
        start, stop = max(0, top - before), min(size.height, bottom + after)
        yield Box(start, 0, stop - start, size.width), top - start


def interval_means(source: BoxSource, rows: Doubles, cols: Doubles) -> Doubles:
    """Mean colours (n, m, 3), coded in [0, 1], over the products of n row intervals (n, 2) and m column intervals (m, 2).

    Intervals are [start, end) in pixels and may begin and end inside one, which then counts by its covered part. One pass.
    """
    sums = np.zeros((len(rows), len(cols), 3))
    for box, _ in band_boxes(source.size):
        y = np.arange(box.top, box.bottom)
        covered = np.minimum(rows[:, 1:], y + 1) - np.maximum(rows[:, :1], y)  # (n, rows of the band)
        np.maximum(covered, 0, out=covered)
        reached = covered.any(1)
        if reached.any():
            across = _integrals(unit(source.read(box)), cols)
            sums[reached] += np.tensordot(covered[reached], across, 1)
    areas = np.diff(rows, axis=1) * np.diff(cols, axis=1)[:, 0]
    return sums / areas[..., None]


def _integrals(band: Floats, cols: Doubles) -> Doubles:
    """Integrals (rows, m, 3) of each row of a band (rows, W, 3) over column intervals (m, 2)."""
    total = np.zeros((band.shape[0], band.shape[1] + 1, 3))
    np.cumsum(band, axis=1, dtype=np.float64, out=total[:, 1:])

    def until(x: Doubles) -> Doubles:
        whole = np.minimum(x.astype(np.int64), band.shape[1] - 1)
        part: Doubles = total[:, whole] + (x - whole)[:, None] * band[:, whole]
        return part

    return until(cols[:, 1]) - until(cols[:, 0])


def equal_parts(extent: int, count: int) -> Doubles:
    """An axis in `count` equal intervals (count, 2)."""
    edges = np.arange(count + 1) * (extent / count)
    edges[-1] = extent
    return np.stack([edges[:-1], edges[1:]], axis=1)


def averaged(source: BoxSource, size: Size) -> Doubles:
    """The picture as means over equal parts, (height, width, 3) coded in [0, 1]; `size` is at most the picture's."""
    rows, cols = equal_parts(source.size.height, size.height), equal_parts(source.size.width, size.width)
    return interval_means(source, rows, cols)


def box_means(source: BoxSource, tops: Sequence[int], lefts: Sequence[int], tile: Size, scale: tuple[float, float]) -> Doubles:
    """Mean colours (rows, columns, 3) of a grid of tiles, cut where they leave the picture.

    All lengths are multiplied by `scale` (down, across).
    """
    starts = np.asarray(tops, dtype=np.float64), np.asarray(lefts, dtype=np.float64)
    extents, ends = (tile.height, tile.width), (source.size.height, source.size.width)
    rows, cols = (
        np.stack([start, np.minimum(start + extent, end / by)], axis=1) * by
        for start, extent, end, by in zip(starts, extents, ends, scale, strict=True)
    )
    return interval_means(source, rows, cols)
