"""`tiled(denoise, grid)`: the denoised estimate is made tile by tile and fused on the canvas; the sampler sees one canvas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hires.conditioning import concatenate
from hires.denoisers import Denoiser
from hires.tiling.blend import BlendWeights, blend_weights
from hires.tiling.geometry import Box, TileGrid
from hires.tiling.retry import Batcher

Shift = Callable[[float], tuple[int, int]]
OnTiles = Callable[[int], None]


def tiled(
    denoise: Denoiser,
    grid: TileGrid,
    *,
    batch: int | Batcher = 1,
    kind: str = "hann",
    shift: Shift | None = None,
    on_tiles: OnTiles | None = None,
) -> Denoiser:
    """A denoiser of the canvas from one of tiles: D(x) = sum_i w_i D(x_i), weights w_i summing to one at every cell.

    `batch` tiles go through `denoise` at once and leave the result unchanged; a batch that runs out of memory is halved
    and goes on (pass a Batcher to keep count). With one tile the canvas goes straight through, bit for bit.
    `shift(sigma)` moves the grid's inner tiles, in cells, per step; `on_tiles(n)` is called after every batch and may
    raise to cancel. The fused estimate is float32.
    """
    batcher = batch if isinstance(batch, Batcher) else Batcher(batch)
    weights_of = lru_cache(maxsize=2)(lambda moved, device: blend_weights(moved, kind, device))

    def fuse(x: Tensor, sigma: float, cond: Any) -> Tensor:
        moved = grid if shift is None else grid.shifted(*shift(sigma))
        boxes = list(moved.boxes())
        if len(boxes) == 1:
            (whole,) = next(iter(batcher.map(lambda _: [denoise(x, sigma, cond)], boxes)))
            _report(on_tiles, 1)
            return whole
        weights: BlendWeights = weights_of(moved, x.device)
        canvas = torch.zeros_like(x, dtype=torch.float32)
        index = 0
        for estimates in batcher.map(lambda chunk: _estimates(denoise, x, sigma, cond, chunk), boxes):
            for estimate in estimates:
                canvas[..., boxes[index].rows, boxes[index].cols] += weights.of(index) * estimate
                index += 1
            _report(on_tiles, len(estimates))
        return canvas

    return fuse


def _estimates(denoise: Denoiser, x: Tensor, sigma: float, cond: Any, boxes: Sequence[Box]) -> Sequence[Tensor]:
    """The float32 estimates of some tiles, evaluated as one batch."""
    tiles = torch.cat([x[..., box.rows, box.cols] for box in boxes])
    conds = None if cond is None else concatenate([cond.crop(box) for box in boxes])
    return torch.split(denoise(tiles, sigma, conds).float(), x.shape[0])


def _report(on_tiles: OnTiles | None, tiles: int) -> None:
    if on_tiles is not None:
        on_tiles(tiles)


def seeded_shift(seed: int, stage: int, most_cells: int) -> Shift:
    """A shift per noise level, uniform in [-most, most] on both axes: a pure function of (seed, stage, sigma)."""

    def shift(sigma: float) -> tuple[int, int]:
        rng = np.random.default_rng([seed, stage, int(np.float64(sigma).view(np.uint64))])
        rows, cols = rng.integers(-most_cells, most_cells + 1, size=2)
        return int(rows), int(cols)

    return shift
