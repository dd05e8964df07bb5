"""Enlarges a picture by a network, in tiles with a halo, top to bottom."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hires.errors import MemoryLadderError
from hires.tiling.geometry import Box, Size
from hires.tiling.resample import RowSource
from hires.tiling.retry import attempt, free_memory

log = logging.getLogger(__name__)
OnTile = Callable[[int, int], None]
"""Called with the tiles done and in all; may raise to cancel."""
SMALLEST_TILE = 16  # pixels of a side, without the halo


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """The tiles of a network, in pixels of its input."""

    rows: int
    """Rows of a tile's core."""
    cols: int
    """Columns of a tile's core."""
    halo: int
    """Pixels read around the core."""
    multiple: int = 1
    """Corners lie on multiples of it."""

    def __post_init__(self) -> None:
        assert self.rows % self.multiple == self.cols % self.multiple == self.halo % self.multiple == 0, f"{self}"

    def count(self, size: Size) -> int:
        """The number of tiles of a picture."""
        return math.ceil(size.height / self.rows) * math.ceil(size.width / self.cols)


class NetworkRows:
    """The rows of a picture enlarged by a network, (1, C, h, w) to (1, C', scale h, scale w).

    Each tile is read with its halo, as far as the picture goes, and only its core is kept. If the network's receptive radius
    is at most the halo, the result equals that of the whole picture. After an out-of-memory this tile and all later ones are
    halved; MemoryLadderError if the smallest tile runs out of memory. `retries` counts the halvings, `tiles` the finished
    tiles.
    """

    def __init__(
        self, source: RowSource, network: Callable[[Tensor], Tensor], scale: int, tiling: Tiling, on_tile: OnTile | None = None
    ) -> None:
        self.source, self.network, self.scale, self.tiling = source, network, scale, tiling
        self.size = source.size.times(scale)
        self.retries, self.tiles = 0, 0
        self._on_tile, self._total = on_tile, tiling.count(source.size)
        self._most = (tiling.rows + 2 * tiling.halo) * (tiling.cols + 2 * tiling.halo)  # pixels of the largest tile to try
        self._kept: list[Tensor] = []
        self._top = self._bottom = 0

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows (C', bottom - top, W) float32 on the CPU; `top` is never above that of an earlier call."""
        while self._bottom < bottom:
            self._next_band(top)
        parts, at = [], self._top
        for band in self._kept:
            start, stop = max(0, top - at), min(band.shape[1], bottom - at)
            if start < stop:
                parts.append(band[:, start:stop])
            at += band.shape[1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _free_above(self, top: int) -> None:
        """Free all rows above `top`; the rest of a cut band is copied, so that its memory is freed too."""
        while self._kept and self._top + self._kept[0].shape[1] <= top:
            self._top += self._kept.pop(0).shape[1]
        if self._kept and self._top < top:
            self._kept[0], self._top = self._kept[0][:, top - self._top :].clone(), top

    def _next_band(self, top: int) -> None:
        self._free_above(top)
        size, tiling, first = self.source.size, self.tiling, self._bottom // self.scale
        last = min(first + tiling.rows, size.height)
        above = max(0, first - tiling.halo)
        strip = self.source.rows(above, min(last + tiling.halo, size.height))
        band: Tensor | None = None
        for left in range(0, size.width, tiling.cols):
            core = Box(first, left, last - first, min(tiling.cols, size.width - left))
            part = self._enlarged(core, strip, above)
            if band is None:
                band = part.new_empty(part.shape[0], core.height * self.scale, self.size.width)
            band[..., left * self.scale : (left + core.width) * self.scale] = part
            self.tiles += 1
            if self._on_tile is not None:
                self._on_tile(self.tiles, self._total)
        assert band is not None
        self._kept.append(band)
        self._bottom = last * self.scale

    def _enlarged(self, core: Box, strip: Tensor, above: int) -> Tensor:
        """The enlarged core (C', rows, cols) on the CPU, computed in halves if it runs out of memory.

        strip: source rows from `above` on.
        """
        with_halo = self._around(core)
        if with_halo.height * with_halo.width > self._most and (halves := self._halves(core)):
            near, far = (self._enlarged(half, strip, above) for half in halves)
            return torch.cat([near, far], dim=1 if halves[0].left == halves[1].left else 2)
        result, message = attempt(lambda box: self._run(core, box, strip, above), with_halo)
        if result is not None:
            return result
        free_memory()
        if not self._halves(core):
            raise MemoryLadderError(
                f"one tile of {core.width}x{core.height} px with a halo of {self.tiling.halo} runs out of memory ({message}): "
                "close other programs, give `device` cpu, or a smaller network"
            )
        self.retries += 1
        self._most = with_halo.height * with_halo.width - 1
        log.warning("out of memory with a tile of %dx%d px (%s); going on with halves", core.width, core.height, message)
        return self._enlarged(core, strip, above)

    def _run(self, core: Box, box: Box, strip: Tensor, above: int) -> Tensor:
        part = strip[:, box.top - above : box.bottom - above, box.cols]
        out, by = self.network(part[None])[0], self.scale
        top, left = (core.top - box.top) * by, (core.left - box.left) * by
        return out[:, top : top + core.height * by, left : left + core.width * by].float().cpu()

    def _around(self, core: Box) -> Box:
        halo, size = self.tiling.halo, self.source.size
        top, left = max(0, core.top - halo), max(0, core.left - halo)
        return Box(top, left, min(core.bottom + halo, size.height) - top, min(core.right + halo, size.width) - left)

    def _halves(self, core: Box) -> tuple[Box, Box] | None:
        """The core cut in two across its longer axis, at a multiple; None if it is too small."""
        multiple = self.tiling.multiple
        long = max(core.height, core.width)
        cut = -(-long // 2 // multiple) * multiple
        if long < 2 * SMALLEST_TILE or not 0 < cut < long:
            return None
        if core.height >= core.width:
            return Box(core.top, core.left, cut, core.width), Box(core.top + cut, core.left, core.height - cut, core.width)
        return Box(core.top, core.left, core.height, cut), Box(core.top, core.left + cut, core.height, core.width - cut)


def choose_tiling(
    size: Size, *, halo: int, multiple: int, bytes_per_px: float, budget_bytes: int, band_bytes: int, row_bytes: int
) -> Tiling:
    """The tiles of a network, as square as memory allows, because halos are computed repeatedly.

    Args:
        size: the picture.
        halo: pixels to read around a tile's core.
        multiple: corners lie on multiples of it.
        bytes_per_px: the network's working memory per pixel of its input.
        budget_bytes: device memory for one tile with its halo.
        band_bytes: host memory for a band of the result.
        row_bytes: bytes of the result per row of the input.
    """
    most = max(1.0, budget_bytes / bytes_per_px)
    side = int(math.sqrt(most)) - 2 * halo
    rows = _whole(min(side, band_bytes // row_bytes), multiple, size.height)
    cols = _whole(int(most / (rows + 2 * halo)) - 2 * halo, multiple, size.width)
    return Tiling(rows=rows, cols=cols, halo=halo, multiple=multiple)


def _whole(wanted: int, multiple: int, extent: int) -> int:
    """A multiple of at most `wanted` and at least `SMALLEST_TILE` that cuts the extent into about equal tiles."""
    least = -(-SMALLEST_TILE // multiple) * multiple
    most = max(least, wanted // multiple * multiple)
    count = math.ceil(extent / most)
    return max(least, -(-math.ceil(extent / count) // multiple) * multiple)
