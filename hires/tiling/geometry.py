"""Sizes, boxes and grids of equal tiles in integers.

One axis at a time, (height, width) everywhere. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Height and width; the variable's name says whether in pixels or in latent cells."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Height times width."""
        return self.height * self.width

    def __str__(self) -> str:
        """The form that people type: WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"

    def divided(self, by: int) -> Size:
        """The size in cells of `by` pixels; both sides must divide."""
        assert self.height % by == 0 and self.width % by == 0, f"{self} is not a multiple of {by}"
        return Size(self.height // by, self.width // by)

    def times(self, by: int) -> Size:
        """Both sides multiplied by `by`."""
        return Size(self.height * by, self.width * by)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a canvas: top-left corner and extent, in the canvas's unit."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The first row below the box."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The first column right of the box."""
        return self.left + self.width

    @property
    def rows(self) -> slice:
        """The box's rows of an array."""
        return slice(self.top, self.bottom)

    @property
    def cols(self) -> slice:
        """The box's columns of an array."""
        return slice(self.left, self.right)


def axis_starts(extent: int, tile: int, overlap: int) -> tuple[int, ...]:
    """The starts of the fewest equal tiles that cover `extent` with at least `overlap` shared by neighbours.

    The starts are spread evenly, t_k = round(k (extent - tile) / (n - 1)), so there is no sliver at the end. A tile at least as
    long as the axis gives one start. ValueError for an overlap outside [0, tile).
    """
    if tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tile {tile} with overlap {overlap}: overlap must be at least 0 and below the tile")
    if tile >= extent:
        return (0,)
    count = math.ceil((extent - overlap) / (tile - overlap))
    span, gaps = extent - tile, count - 1
    return tuple((2 * k * span + gaps) // (2 * gaps) for k in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class TileGrid:
    """A grid of equal tiles over a canvas. Hashable; saved with the picture."""

    canvas: Size
    """The size of the canvas."""
    tile: Size
    """The size of every tile."""
    tops: tuple[int, ...]
    """The first row of each row of tiles."""
    lefts: tuple[int, ...]
    """The first column of each column of tiles."""

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.tops) * len(self.lefts)

    def boxes(self) -> Iterator[Box]:
        """All tiles, row-major."""
        for top in self.tops:
            for left in self.lefts:
                yield Box(top, left, self.tile.height, self.tile.width)

    def shifted(self, rows: int, cols: int) -> TileGrid:
        """The grid with its inner tiles moved; the outer ones stay, so the canvas stays covered.

        The shift is clipped such that neighbours keep at least one cell of overlap.
        """
        return TileGrid(
            canvas=self.canvas,
            tile=self.tile,
            tops=_shift_axis(self.tops, self.tile.height, rows),
            lefts=_shift_axis(self.lefts, self.tile.width, cols),
        )


def _shift_axis(starts: tuple[int, ...], tile: int, by: int) -> tuple[int, ...]:
    if len(starts) < 3:
        return starts
    least_gap = min(b - a for a, b in itertools.pairwise(starts))
    room = max(0, min(least_overlap(starts, tile), least_gap) - 1)
    by = max(-room, min(room, by))
    return (starts[0], *(start + by for start in starts[1:-1]), starts[-1])


def least_overlap(starts: tuple[int, ...], tile: int) -> int:
    """The fewest cells that two neighbouring tiles share; the tile's length if there is only one."""
    return min((a + tile - b for a, b in itertools.pairwise(starts)), default=tile)


def make_grid(canvas: Size, tile: Size, overlap: int) -> TileGrid:
    """A grid of equal tiles whose neighbours share at least `overlap`; a tile never exceeds the canvas.

    An axis that the tile spans whole has no overlap. ValueError for an overlap that is not below the tile.
    """
    fitted = Size(min(tile.height, canvas.height), min(tile.width, canvas.width))
    return TileGrid(
        canvas=canvas,
        tile=fitted,
        tops=axis_starts(canvas.height, fitted.height, overlap if fitted.height < canvas.height else 0),
        lefts=axis_starts(canvas.width, fitted.width, overlap if fitted.width < canvas.width else 0),
    )


def bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """Bands (top, bottom) of at most `rows` rows over `height`: as few as possible, and about equally tall."""
    count = -(-height // rows)
    tall = -(-height // count)
    for top in range(0, height, tall):
        yield top, min(top + tall, height)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is at least `value`."""
    return -(-value // multiple) * multiple


def snap(size: Size, align_px: int) -> Size:
    """The smallest canvas that holds `size` and divides by `align_px` on both sides."""
    return Size(round_up(size.height, align_px), round_up(size.width, align_px))


def cover(source: Size, target: Size) -> tuple[Size, Box]:
    """How to resize and then crop `source` to `target`: (size to resize to, box of it to keep).

    The tighter axis is assigned, not computed, so rounding can never lose a pixel (diffusers #8911).
    """
    if target.height * source.width >= target.width * source.height:
        resized = Size(target.height, max(target.width, -(-source.width * target.height // source.height)))
    else:
        resized = Size(max(target.height, -(-source.height * target.width // source.width)), target.width)
    top, left = (resized.height - target.height) // 2, (resized.width - target.width) // 2
    return resized, Box(top, left, target.height, target.width)


def relay_view(source: Size, target: Size) -> tuple[Size, Box]:
    """How a stage's picture becomes the next canvas: (size to resize to, box of it to keep).

    Aspect ratios that differ by less than 5 %, as rounding does, are stretched; others are covered and cropped.
    """
    if abs(math.log(target.width * source.height / (target.height * source.width))) < 0.05:
        return target, Box(0, 0, target.height, target.width)
    return cover(source, target)
