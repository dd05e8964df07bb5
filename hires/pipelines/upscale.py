"""Enlarges a picture by rows: a network in tiles, then Lanczos.

Alpha is enlarged by Lanczos.

Values are those of the file in [0, 1]: an ESRGAN-class network was trained on coded ones, and what colours they stand for is
the profile's affair. Rows leave from top to bottom and are held no longer than what comes after them reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hires.errors import RequestError
from hires.images.boxes import Pixels, unit
from hires.images.sources import ImageSource
from hires.models.upscalers import UpscalerNetwork
from hires.tiling.geometry import Box, Size, cover
from hires.tiling.network import NetworkRows, OnTile, Tiling, choose_tiling
from hires.tiling.resample import Resampled, RowSource

BAND_BYTES = 2**28  # float32 rows of a network's result on the host; lower bands read more of their halo than of themselves
ROWS_BYTES = 2**23  # float32 rows that leave at once
CPU_BUDGET = 2**29  # where no budget is given: larger tiles are no faster on a CPU
PROBE_PX = 64
SPARE = 0.75  # of the budget: convolutions' workspaces grow otherwise than maps do


class PictureRows:
    """The colour or the alpha of a picture as rows (C, n, W) in [0, 1] float32; grey as `channels` equal ones."""

    def __init__(self, source: ImageSource, channels: int, alpha: bool = False) -> None:
        self.source, self.channels = source, channels
        last = source.bands - 1
        self._bands = slice(last, last + 1) if alpha else slice(0, source.bands - source.has_alpha)

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.source.size

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows (C, n, W) float32 in [0, 1]."""
        pixels = self.source.read(Box(top, 0, bottom - top, self.size.width))[..., self._bands]
        planes = torch.from_numpy(np.ascontiguousarray(unit(pixels).transpose(2, 0, 1)))
        return planes if len(planes) == self.channels else planes.expand(self.channels, -1, -1)


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a picture as a picture."""

    source: RowSource
    box: Box

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return Size(self.box.height, self.box.width)

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows (C, n, W) of the part."""
        return self.source.rows(self.box.top + top, self.box.top + bottom)[..., self.box.cols]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enlargement:
    """How one picture is enlarged."""

    colour: RowSource
    """Rows of its colour."""
    alpha: RowSource | None
    """Rows of its alpha, where it has one."""
    grey: bool
    """Whether the result is grey."""
    network: NetworkRows | None
    """The tiles that a network runs in; None for Lanczos."""

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.colour.size


def enlarge(
    source: ImageSource,
    beside: ImageSource | None,
    size: Size,
    upscaler: UpscalerNetwork | None = None,
    tiling: Tiling | None = None,
    on_tile: OnTile | None = None,
) -> Enlargement:
    """A picture at exactly `size`, cut evenly on one axis where its shape is another.

    beside: the same picture opened once more, for its alpha, whose rows are read at another pace. upscaler: None for Lanczos.
    """
    planes = source.bands - source.has_alpha
    plain: RowSource = PictureRows(source, planes if upscaler is None else upscaler.channels)
    network = None
    if upscaler is not None:
        assert tiling is not None, "a network has tiles"
        if planes == 3 and upscaler.channels == 1:
            raise RequestError(f"upscaler {upscaler.name}: takes grey pictures only, this one has colour; give another")
        network = NetworkRows(plain, upscaler.network, upscaler.scale, tiling, on_tile)
        plain = network
    alpha = PictureRows(beside, 1, alpha=True) if beside is not None and source.has_alpha else None
    return Enlargement(
        colour=_sized(plain, source.size, size),
        alpha=None if alpha is None else _sized(alpha, source.size, size),
        grey=planes == 1,
        network=network,
    )


def _sized(plain: RowSource, shape: Size, size: Size) -> RowSource:
    """A picture of the proportions of `shape` that fills `size`."""
    resized, box = cover(shape, size)
    whole: RowSource = plain if plain.size == resized else Resampled(plain, resized)
    return whole if resized == size else Cut(whole, box)


def bands_of(enlarged: Enlargement, dtype: np.dtype[np.generic]) -> Iterator[Pixels]:
    """Finished rows (n, W, bands) from top to bottom, coded as `dtype`; the first planes are colour, alpha comes last."""
    size = enlarged.size
    rows = max(1, ROWS_BYTES // (size.width * 16))
    for top in range(0, size.height, rows):
        bottom = min(top + rows, size.height)
        planes = enlarged.colour.rows(top, bottom)
        if enlarged.grey and len(planes) > 1:
            planes = planes.mean(0, keepdim=True)
        if enlarged.alpha is not None:
            planes = torch.cat([planes, enlarged.alpha.rows(top, bottom).clamp(0, 1)])
        yield coded(planes, dtype)


def coded(planes: Tensor, dtype: np.dtype[np.generic]) -> Pixels:
    """Planes (C, n, W) in [0, 1] as (n, W, C): integers rounded half up and clipped, floats as they are."""
    values = planes.permute(1, 2, 0).contiguous()
    if np.issubdtype(dtype, np.floating):
        return values.numpy().astype(dtype, copy=False)
    levels = np.iinfo(dtype.name).max
    whole: Pixels = values.mul(levels).add_(0.5).clamp_(0, levels).numpy().astype(dtype)
    return whole


def plan_tiles(upscaler: UpscalerNetwork, size: Size, budget_bytes: int | None, tile_px: int | None = None) -> Tiling:
    """The tiles of a network over a picture: of `tile_px` where that is given, else the largest that the budget holds.

    budget_bytes: of working memory on the device, None for `CPU_BUDGET`.
    """
    unit_px, halo = upscaler.multiple, upscaler.halo.pixels
    if upscaler.whole:
        whole = Size(*(-(-side // unit_px) * unit_px for side in (size.height, size.width)))
        return Tiling(rows=whole.height, cols=whole.width, halo=0, multiple=unit_px)
    if tile_px is not None:
        side = max(1, tile_px // unit_px) * unit_px
        return Tiling(rows=side, cols=side, halo=halo, multiple=unit_px)
    return choose_tiling(
        size,
        halo=halo,
        multiple=unit_px,
        bytes_per_px=working_bytes(upscaler),
        budget_bytes=int(SPARE * (budget_bytes or CPU_BUDGET)),
        band_bytes=BAND_BYTES,
        row_bytes=4 * upscaler.channels * upscaler.scale**2 * size.width,
    )


def working_bytes(upscaler: UpscalerNetwork) -> float:
    """Bytes that the network holds at its peak per pixel of its input, weights apart, measured on a small tile.

    By torch's allocator on a card, else by counting live tensors.
    """
    from hires.tiling.footprint import counted

    side = math.ceil(PROBE_PX / upscaler.multiple) * upscaler.multiple
    probe = torch.full((1, upscaler.channels, side, side), 0.5)
    if upscaler.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(upscaler.device)
        before = torch.cuda.memory_allocated(upscaler.device)
        upscaler.network(probe)
        return float(torch.cuda.max_memory_allocated(upscaler.device) - before) / side**2
    with counted() as live:
        upscaler.network(probe)
    return live.peak / side**2
