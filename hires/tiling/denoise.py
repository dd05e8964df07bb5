"""Denoises a canvas tile by tile and fuses the estimates into one canvas."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from hires.kernels.blend import blend_accumulate
from hires.protocols import Condition, Denoiser
from hires.tiling.blend import BlendWeights, blend_weights
from hires.tiling.geometry import Box, TileGrid
from hires.tiling.retry import Batcher

Shift = Callable[[float], tuple[int, int]]
"""The shift of a grid's inner tiles at a noise level: (rows, columns) in cells."""

OnTiles = Callable[[int], None]
"""Called with the number of tiles just finished; may raise to cancel."""


def tiled(
    denoise: Denoiser,
    grid: TileGrid,
    *,
    batch: int | Batcher = 1,
    kind: str = "hann",
    shift: Shift | None = None,
    on_tiles: OnTiles | None = None,
) -> Denoiser:
    """A denoiser of the canvas from a denoiser of tiles: D(x) = sum_i w_i D(x_i), the weights summing to one at every cell.

    Args:
        denoise: evaluates tiles (B, C, tile).
        grid: the tiles of the canvas, in cells.
        batch: how many tiles of how many pictures go through `denoise` at once; does not change the result. A batch that runs
            out of memory is halved, down to one tile of one picture. Pass a `Batcher` to count the retries.
        kind: the blend window, one of `tiling.blend.KINDS`.
        shift: moves the grid's inner tiles at each noise level.
        on_tiles: called after every batch with the tiles it finished; may raise to cancel.

    The fused estimate is float32. A grid of one tile passes the canvas through unchanged.
    """
    batcher = batch if isinstance(batch, Batcher) else Batcher(batch)
    weights_of = lru_cache(maxsize=2)(lambda moved, device: blend_weights(moved, kind, device))

    def fuse(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        moved = grid if shift is None else grid.shifted(*shift(sigma))
        boxes, pictures = list(moved.boxes()), x.shape[0]
        units = [(box, picture) for box in boxes for picture in range(pictures)]
        run = partial(_estimates, denoise, x, sigma, cond)
        if len(boxes) == 1:
            parts = [part for estimates in batcher.map(run, units) for part in estimates]
            _report(on_tiles, 1)
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return fused(run, x, moved, weights_of(moved, x.device), batcher, on_tiles)

    return fuse


Unit = tuple[Box, int]  # a tile of one picture: its box, and the picture's index in the batch


def fused(
    run: Callable[[Sequence[Unit]], Sequence[Tensor]],
    x: Tensor,
    grid: TileGrid,
    weights: BlendWeights,
    batcher: Batcher,
    on_tiles: OnTiles | None = None,
) -> Tensor:
    """sum_i w_i run(x_i): the canvas of x (B, C, h, w) from estimates of its tiles, float32.

    `run(units)` gives the estimates of some units, each (pictures, channels, tile), in the units' order. The canvas has as
    many channels as the estimates.
    """
    units = [(box, picture) for box in grid.boxes() for picture in range(x.shape[0])]
    canvas, done, pictures = torch.empty(0), 0, x.shape[0]
    for estimates in batcher.map(run, units):
        finished = done // pictures
        for estimate in estimates:
            if not done:
                canvas = x.new_zeros((pictures, estimate.shape[1], *x.shape[-2:]), dtype=torch.float32)
            box, picture = units[done]
            stop = picture + estimate.shape[0]
            blend_accumulate(canvas[picture:stop], estimate, *weights.axes(done // pictures), box.top, box.left)
            done += estimate.shape[0]
        _report(on_tiles, done // pictures - finished)
    return canvas


def _estimates(denoise: Denoiser, x: Tensor, sigma: float, cond: Condition | None, units: Sequence[Unit]) -> Sequence[Tensor]:
    """The estimates of some units, evaluated as one batch: one tensor per tile, with its pictures."""
    groups = ((box, [picture for _, picture in group]) for box, group in itertools.groupby(units, lambda unit: unit[0]))
    spans = [(box, pictures[0], pictures[-1] + 1) for box, pictures in groups]
    tiles = [x[start:stop, :, box.rows, box.cols] for box, start, stop in spans]
    if cond is None:
        conds = None
    else:
        first, *others = (cond.pictures(start, stop).crop(box) for box, start, stop in spans)
        conds = first.concatenate(*others)
    estimates = denoise(torch.cat(tiles) if len(tiles) > 1 else tiles[0], sigma, conds)
    return torch.split(estimates, [stop - start for _, start, stop in spans])


def _report(on_tiles: OnTiles | None, tiles: int) -> None:
    if on_tiles is not None:
        on_tiles(tiles)


def seeded_shift(seed: int, stage: int, most_cells: int) -> Shift:
    """A shift that is uniform in [-most_cells, most_cells] on both axes: a pure function of (seed, stage, sigma)."""

    def shift(sigma: float) -> tuple[int, int]:
        rng = np.random.default_rng([seed, stage, int(np.float64(sigma).view(np.uint64))])
        rows, cols = rng.integers(-most_cells, most_cells + 1, size=2)
        return int(rows), int(cols)

    return shift
