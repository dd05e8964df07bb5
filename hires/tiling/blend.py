"""Separable blend weights of tiles that sum to one at every cell of the canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.errors import RequestError, unknown
from hires.tiling.geometry import TileGrid

KINDS = ("box", "gauss", "hann", "linear")
FLOOR = 1e-3  # keeps the Hann window positive at its ends


def window(length: int, kind: str) -> NDArray[np.float64]:
    """An unnormalised 1-D window, positive everywhere. RequestError for an unknown kind.

    hann sin^2(pi (i + 1/2) / n) + 1e-3; gauss exp(-(u - c)^2 / (2 * 0.01 n^2)); box 1; linear rising and falling.
    """
    i = np.arange(length, dtype=np.float64)
    if kind == "hann":
        return np.sin(np.pi * (i + 0.5) / length) ** 2 + FLOOR
    if kind == "gauss":
        return np.exp(-((i - (length - 1) / 2) ** 2) / (2 * 0.01 * length**2))
    if kind == "linear":
        return np.minimum(i + 1, length - i)
    if kind == "box":
        return np.ones(length)
    raise RequestError(unknown("blend window", kind, KINDS))


def axis_weights(starts: tuple[int, ...], tile: int, extent: int, kind: str) -> NDArray[np.float32]:
    """The weights (len(starts), tile) of the tiles of one axis; they sum to one at every cell of `extent`."""
    shape = window(tile, kind)
    total = np.zeros(extent)
    for start in starts:
        total[start : start + tile] += shape
    assert (total > 0).all(), "the tiles do not cover the axis"
    return np.stack([shape / total[start : start + tile] for start in starts]).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlendWeights:
    """The separable blend weights of a grid, float32."""

    rows: Tensor
    """(n_rows, tile_h): the weights of each row of tiles along the height."""
    cols: Tensor
    """(n_cols, tile_w): the weights of each column of tiles along the width."""

    def axes(self, index: int) -> tuple[Tensor, Tensor]:
        """The weights (tile_h) and (tile_w) of the tile at a row-major index."""
        row, col = divmod(index, self.cols.shape[0])
        return self.rows[row], self.cols[col]

    def of(self, index: int) -> Tensor:
        """The 2-D weights (tile_h, tile_w) of that tile."""
        rows, cols = self.axes(index)
        return rows[:, None] * cols[None, :]


def blend_weights(grid: TileGrid, kind: str = "hann", device: torch.device | str = "cpu") -> BlendWeights:
    """The weights of every tile of a grid. RequestError for an unknown kind."""
    rows = axis_weights(grid.tops, grid.tile.height, grid.canvas.height, kind)
    cols = axis_weights(grid.lefts, grid.tile.width, grid.canvas.width, kind)
    return BlendWeights(rows=torch.from_numpy(rows).to(device), cols=torch.from_numpy(cols).to(device))
