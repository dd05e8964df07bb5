"""Group statistics over bands, merged exactly: Chan, Golub and LeVeque 1979. Halo rows are never counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and biased variance (B, G) of `count` values per group."""

    count: int
    mean: Tensor
    var: Tensor

    def merged(self, other: Moments) -> Moments:
        """Those of both together: delta^2 n_a n_b / n is what separately normalised tiles drop."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count
        var = self.var * (1 - share) + other.var * share + delta**2 * (share * (1 - share))
        return Moments(count, self.mean + delta * share, var)


def band_moments(band: Tensor, groups: int) -> Moments:
    """Moments (B, G) of one band (B, C, rows, W), per channel first and then merged over the channels of each group."""
    per_channel = _var_mean(band.to(accumulator(band.dtype)))
    var, mean = (t.reshape(t.shape[0], groups, -1) for t in per_channel)
    centre = mean.mean(-1)
    spread = (mean - centre[..., None]).square().mean(-1)
    return Moments(band[0, 0].numel() * var.shape[-1], centre, var.mean(-1) + spread)


CACHED = 2**19  # values that stay in a core's cache between two passes


def _var_mean(band: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean (B, C) per channel; torch's own is a scalar loop on a CPU, 8 times slower than two passes."""
    if band.device.type != "cpu":
        return torch.var_mean(band, dim=(2, 3), correction=0)
    mean = band.mean(dim=(2, 3), keepdim=True)
    total = torch.zeros_like(mean)
    for rows in band.split(max(1, CACHED // max(1, band[:, :, 0].numel())), dim=2):  # type: ignore[no-untyped-call]
        total += (rows - mean).square_().sum(dim=(2, 3), keepdim=True)
    return (total / band[0, 0].numel())[..., 0, 0], mean[..., 0, 0]


def moments(bands: Iterable[Tensor], groups: int) -> Moments:
    """Moments of a map given as bands (B, C, rows, W)."""
    total: Moments | None = None
    for band in bands:
        part = band_moments(band, groups)
        total = part if total is None else total.merged(part)
    assert total is not None, "a map has at least one band"
    return total


def affine(norm: nn.GroupNorm, found: Moments) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, C, 1, 1) such that x * scale + shift is the norm of x."""
    size = norm.num_channels // norm.num_groups
    mean, rstd = (t.repeat_interleave(size, 1) for t in (found.mean, (found.var + norm.eps).rsqrt()))
    scale = rstd if norm.weight is None else rstd * norm.weight.to(rstd.dtype)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(shift.dtype)
    return scale[..., None, None], shift[..., None, None]
