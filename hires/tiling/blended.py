"""Latents to pixels and back in overlapping tiles, pixels leaving as finished bands from top to bottom.

Each tile has its own normalisation statistics, so this is an approximation wherever there is more than one tile; with
one tile it is the module itself. Knows the structure `decode`/`encode` of an autoencoder, no model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from hires.tiling.blend import BlendWeights, blend_weights
from hires.tiling.geometry import Box, Size, TileGrid, make_grid
from hires.types import DecodePlan

Map = Callable[[Tensor], Tensor]
OnBand = Callable[[int, int], None]


def decode_bands(
    decode: Map, latents: Tensor, plan: DecodePlan, cell_px: int, on_tile: OnBand | None = None
) -> Iterator[Tensor]:
    """Finished bands (B, 3, band_h, W) float32 of the decoded picture, top to bottom; W = w * cell_px.

    `decode` maps latents (B, C, h, w) to pixels (B, 3, h * cell_px, w * cell_px); `latents` is as it takes them.
    `on_tile(done, total)` is called after every tile and may raise to cancel.
    """
    cells = Size(latents.shape[-2], latents.shape[-1])
    grid = make_grid(cells, Size(plan.tile_cells, plan.tile_cells), plan.overlap_cells)
    weights = blend_weights(_scaled(grid, cell_px), "linear", "cpu")
    carry: Tensor | None = None
    for row, top in enumerate(grid.tops):
        strip = _strip(decode, latents, grid, weights, row, cell_px, on_tile)
        if carry is not None:
            strip[..., : carry.shape[-2], :] += carry
        following = grid.tops[row + 1] if row + 1 < len(grid.tops) else cells.height
        ready = (following - top) * cell_px
        carry = strip[..., ready:, :].clone()
        yield strip[..., :ready, :]


def _strip(
    decode: Map, latents: Tensor, grid: TileGrid, weights: BlendWeights, row: int, cell_px: int, on_tile: OnBand | None
) -> Tensor:
    """One row of tiles, blended along the row and weighted down it: (B, 3, tile_h, W) on the CPU."""
    top, tile, columns = grid.tops[row], grid.tile, len(grid.lefts)
    shape = (latents.shape[0], 3, tile.height * cell_px, grid.canvas.width * cell_px)
    strip = torch.zeros(shape, dtype=torch.float32)
    for col, left in enumerate(grid.lefts):
        piece = latents[..., top : top + tile.height, left : left + tile.width]
        pixels = decode(piece).float().cpu()
        strip[..., left * cell_px : (left + tile.width) * cell_px] += pixels * weights.cols[col]
        if on_tile is not None:
            on_tile(row * columns + col + 1, grid.count)
    return strip.mul_(weights.rows[row][:, None])


class PixelSource(Protocol):
    """A picture that is read box by box, values in [-1, 1]."""

    @property
    def size(self) -> Size: ...

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, 3, part.height, part.width)."""
        ...


def encode_tiles(encode: Map, source: PixelSource, plan: DecodePlan, cell_px: int, on_tile: OnBand | None = None) -> Tensor:
    """Latents (B, C, h, w) float32 on the CPU of a picture whose sides divide by `cell_px`, read tile by tile.

    Tiles as in decoding; `encode` maps pixels to the posterior's mean.
    """
    cells = source.size.divided(cell_px)
    grid = make_grid(cells, Size(plan.tile_cells, plan.tile_cells), plan.overlap_cells)
    weights = blend_weights(grid, "linear", "cpu")
    canvas: Tensor | None = None
    for index, box in enumerate(grid.boxes()):
        part = Box(box.top * cell_px, box.left * cell_px, box.height * cell_px, box.width * cell_px)
        latent = encode(source.crop(part)).float().cpu()
        if canvas is None:
            canvas = torch.zeros((*latent.shape[:2], cells.height, cells.width))
        canvas[..., box.rows, box.cols] += weights.of(index) * latent
        if on_tile is not None:
            on_tile(index + 1, grid.count)
    assert canvas is not None
    return canvas


def _scaled(grid: TileGrid, by: int) -> TileGrid:
    """The grid in pixels."""
    return TileGrid(
        canvas=grid.canvas.times(by),
        tile=grid.tile.times(by),
        tops=tuple(top * by for top in grid.tops),
        lefts=tuple(left * by for left in grid.lefts),
    )
