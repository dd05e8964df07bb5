"""Sizes, boxes and grids of equal tiles: integers only, one axis at a time, (height, width) everywhere. No torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Size:
    """Height and width, in pixels or in latent cells as the name that holds it says."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width

    def __str__(self) -> str:
        """The text form people type: WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"

    def divided(self, by: int) -> Size:
        """The size in cells of `by` pixels; an invariant that both sides divide."""
        assert self.height % by == 0 and self.width % by == 0, f"{self} is not a multiple of {by}"
        return Size(self.height // by, self.width // by)

    def times(self, by: int) -> Size:
        return Size(self.height * by, self.width * by)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a canvas: top-left corner and extent, in the canvas's own unit."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        return self.top + self.height

    @property
    def right(self) -> int:
        return self.left + self.width

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def cols(self) -> slice:
        return slice(self.left, self.right)


def axis_starts(extent: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Starts of the fewest equal tiles that cover `extent` with at least `overlap` shared by neighbours.

    The starts are spread evenly, t_k = round(k (extent - tile) / (n - 1)), so there is no sliver at the end.
    A tile as long as the axis, or longer, is the whole axis: one start.
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
    """Rows x columns of equal tiles over a canvas; every tile is `tile` large. Hashable, saved with the picture."""

    canvas: Size
    tile: Size
    tops: tuple[int, ...]
    lefts: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.tops) * len(self.lefts)

    def boxes(self) -> Iterator[Box]:
        """All tiles, row-major."""
        for top in self.tops:
            for left in self.lefts:
                yield Box(top, left, self.tile.height, self.tile.width)

    def shifted(self, rows: int, cols: int) -> TileGrid:
        """The grid with its inner tiles moved; the outer ones stay, so the canvas stays covered.

        A shift is clipped to what the overlap allows (one cell of overlap remains).
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
    """The smallest number of cells that two neighbouring tiles share; the tile itself where there is only one."""
    return min((a + tile - b for a, b in itertools.pairwise(starts)), default=tile)


def make_grid(canvas: Size, tile: Size, overlap: int) -> TileGrid:
    """Equal tiles over the canvas, per axis at least `overlap` shared; a tile never exceeds the canvas.

    On an axis that the tile spans whole, there is nothing to overlap. ValueError for an overlap not below the tile.
    """
    fitted = Size(min(tile.height, canvas.height), min(tile.width, canvas.width))
    return TileGrid(
        canvas=canvas,
        tile=fitted,
        tops=axis_starts(canvas.height, fitted.height, overlap if fitted.height < canvas.height else 0),
        lefts=axis_starts(canvas.width, fitted.width, overlap if fitted.width < canvas.width else 0),
    )


def bands(height: int, rows: int) -> Iterator[tuple[int, int]]:
    """Bands (top, bottom) of `height` rows, as few as `rows` allows and all of one height but the last, which is no sliver."""
    count = -(-height // rows)
    tall = -(-height // count)
    for top in range(0, height, tall):
        yield top, min(top + tall, height)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def snap(size: Size, align_px: int) -> Size:
    """The smallest canvas that holds `size` and divides by `align_px` on both sides."""
    return Size(round_up(size.height, align_px), round_up(size.width, align_px))


def cover(source: Size, target: Size) -> tuple[Size, Box]:
    """Resize then crop so that `source` fills `target` exactly: (size to resize to, box of it to keep).

    The binding axis is assigned, not computed, so rounding can never lose a pixel (diffusers #8911).
    """
    if target.height * source.width >= target.width * source.height:
        resized = Size(target.height, max(target.width, -(-source.width * target.height // source.height)))
    else:
        resized = Size(max(target.height, -(-source.height * target.width // source.width)), target.width)
    top, left = (resized.height - target.height) // 2, (resized.width - target.width) // 2
    return resized, Box(top, left, target.height, target.width)


def relay_view(source: Size, target: Size) -> tuple[Size, Box]:
    """How a stage's picture becomes the next canvas: stretched where the aspects differ by rounding (5 %), else covered."""
    if abs(math.log(target.width * source.height / (target.height * source.width))) < 0.05:
        return target, Box(0, 0, target.height, target.width)
    return cover(source, target)
