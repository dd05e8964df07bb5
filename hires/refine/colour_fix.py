"""Colour fixes at the end of a render: the colours of the picture it came from, the detail it was given.

`wavelet_fixed` works on the bands that leave the decoder, so neither picture is held whole; `adain` needs the whole's mean and
deviation first, which `ColourStatistics` gathers from bands. Pictures are (B, C, h, w); both are used by StableSR (2305.07015).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.tiling.geometry import Box
from hires.tiling.vae import PixelSource

LEVELS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourStatistics:
    """Mean and standard deviation (B, C, 1, 1) of every channel, float64, and of how many cells."""

    mean: Tensor
    std: Tensor
    count: int

    @classmethod
    def of(cls, bands: Iterable[Tensor]) -> ColourStatistics:
        """Of a picture given whole, [x], or in bands; merged pairwise (Chan et al. 1983), so no cancellation of squares."""
        count, mean, spread = 0, torch.zeros(()), torch.zeros(())
        for band in bands:
            own = band.double()
            cells = own.shape[-2] * own.shape[-1]
            own_mean = own.mean((-2, -1), keepdim=True)
            away = own_mean - mean
            total = count + cells
            spread = spread + ((own - own_mean) ** 2).sum((-2, -1), keepdim=True) + away**2 * (count * cells / total)
            mean, count = mean + away * (cells / total), total
        return cls(mean=mean, std=(spread / count).sqrt(), count=count)


def adain(x: Tensor, own: ColourStatistics, wanted: ColourStatistics) -> Tensor:
    """(x - mean) std' / std + mean', channel by channel (Huang & Belongie 2017): a picture or a band of it, float32."""
    return ((x - own.mean) * (wanted.std / own.std.clamp_min(1e-12)) + wanted.mean).float()


def wavelet_fixed(bands: Iterable[Tensor], reference: PixelSource, levels: int = LEVELS) -> Iterator[Tensor]:
    """x + LP(reference - x), band by band: the reference's low band under the picture's detail, (B, C, rows, W) float32.

    LP is `levels` steps of the a-trous B-spline (1, 2, 1) / 4, edges repeated; it reaches 2^levels - 1 rows, and so many are
    held back. The rows that leave are those of the whole picture treated at once, however it is cut into bands.
    """
    reach, done = 2**levels - 1, 0
    kept: Tensor | None = None  # rows of x from `done` on
    apart: Tensor | None = None  # rows of reference - x, from `reach` rows above `done`, the first row repeated
    for band in bands:
        x = band.float()
        top = done + (0 if kept is None else kept.shape[-2])
        difference = reference.crop(Box(top, 0, x.shape[-2], x.shape[-1])).to(x) - x
        if kept is None or apart is None:
            kept, apart = x, F.pad(difference, (0, 0, reach, 0), mode="replicate")
        else:
            kept, apart = torch.cat([kept, x], -2), torch.cat([apart, difference], -2)
        ready = kept.shape[-2] - reach
        if ready > 0:
            yield kept[..., :ready, :] + smoothed(apart, levels)
            kept, apart, done = kept[..., ready:, :], apart[..., ready:, :], done + ready
    if kept is not None and apart is not None:
        yield kept + smoothed(F.pad(apart, (0, 0, 0, reach), mode="replicate"), levels)


def smoothed(rows: Tensor, levels: int) -> Tensor:
    """The a-trous low band of rows (B, C, h + 2 reach, w) as (B, C, h, w); columns are repeated at both sides."""
    reach = 2**levels - 1
    x = F.pad(rows, (reach, reach, 0, 0), mode="replicate")
    for level in range(levels):
        step = 2**level
        for axis in (-2, -1):
            length = x.shape[axis] - 2 * step
            near, far = (x.narrow(axis, start, length) for start in (0, 2 * step))
            x = (near + far + 2 * x.narrow(axis, step, length)) / 4
    return x
