"""Colour fixes: give a finished picture the colours of its reference.

`wavelet_fixed` works on bands as the decoder finishes them, so neither picture is held whole. `adain` first needs the mean
and deviation of the whole picture, which `ColourStatistics` gathers from bands. StableSR uses both (2305.07015). Pictures
are (B, C, h, w).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.tiling.geometry import Box
from hires.tiling.vae import PixelSource

LEVELS = 5  # of the wavelet: colours are taken over from features wider than 2^5 pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourStatistics:
    """The mean and standard deviation of every channel of a picture."""

    mean: Tensor
    """(B, C, 1, 1) float64."""
    std: Tensor
    """(B, C, 1, 1) float64."""
    count: int
    """Pixels per channel."""

    @classmethod
    def of(cls, bands: Iterable[Tensor]) -> ColourStatistics:
        """The statistics of a picture given as bands, or whole as [x].

        Bands are merged pairwise (Chan et al. 1983), which avoids the cancellation of E[x^2] - E[x]^2.
        """
        count, mean, spread = 0, torch.zeros(()), torch.zeros(())
        for band in bands:
            values = band.double()
            cells = values.shape[-2] * values.shape[-1]
            band_mean = values.mean((-2, -1), keepdim=True)
            delta = band_mean - mean
            total = count + cells
            spread = spread + ((values - band_mean) ** 2).sum((-2, -1), keepdim=True) + delta**2 * (count * cells / total)
            mean, count = mean + delta * (cells / total), total
        return cls(mean=mean, std=(spread / count).sqrt(), count=count)


def adain(x: Tensor, own: ColourStatistics, reference: ColourStatistics) -> Tensor:
    """(x - mean) std' / std + mean' for each channel (Huang & Belongie 2017).

    x: a picture or a band of it. own: the statistics of the whole picture. The result is float32.
    """
    return ((x - own.mean) * (reference.std / own.std.clamp_min(1e-12)) + reference.mean).float()


def wavelet_fixed(bands: Iterable[Tensor], reference: PixelSource, levels: int = LEVELS) -> Iterator[Tensor]:
    """X + LP(reference - x), band by band: the reference's low band under the picture's own detail.

    LP applies `levels` steps of the a-trous B-spline (1, 2, 1) / 4 with repeated edges. It reaches 2^levels - 1 rows, so the
    last 2^levels - 1 rows wait for the next band. Yields (B, C, rows, W) float32; the rows do not depend on the cuts.
    """
    reach, done = 2**levels - 1, 0
    pending: Tensor | None = None  # rows of x from `done` on
    differences: Tensor | None = None  # rows of reference - x from `done` - `reach` on, the first row repeated
    for band in bands:
        x = band.float()
        top = done + (0 if pending is None else pending.shape[-2])
        difference = reference.crop(Box(top, 0, x.shape[-2], x.shape[-1])).to(x) - x
        if pending is None or differences is None:
            pending, differences = x, F.pad(difference, (0, 0, reach, 0), mode="replicate")
        else:
            pending, differences = torch.cat([pending, x], -2), torch.cat([differences, difference], -2)
        ready = pending.shape[-2] - reach
        if ready > 0:
            yield pending[..., :ready, :] + smoothed(differences, levels)
            pending, differences, done = pending[..., ready:, :], differences[..., ready:, :], done + ready
    if pending is not None and differences is not None:
        yield pending + smoothed(F.pad(differences, (0, 0, 0, reach), mode="replicate"), levels)


def smoothed(rows: Tensor, levels: int) -> Tensor:
    """The a-trous low band (B, C, h, w) of rows (B, C, h + 2 reach, w), reach = 2^levels - 1; edge columns are repeated."""
    reach = 2**levels - 1
    x = F.pad(rows, (reach, reach, 0, 0), mode="replicate")
    for level in range(levels):
        step = 2**level
        for axis in (-2, -1):
            length = x.shape[axis] - 2 * step
            near, far = (x.narrow(axis, start, length) for start in (0, 2 * step))
            x = (near + far + 2 * x.narrow(axis, step, length)) / 4
    return x
