"""GroupNorm statistics of a map that arrives in bands.

Bands are merged exactly (Chan, Golub and LeVeque 1979); halo rows are never counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from hires.kernels.group_norm import Moments, group_norm_stats


def moments(bands: Iterable[Tensor], groups: int) -> Moments:
    """The moments of a map given as bands (B, C, rows, W)."""
    total: Moments | None = None
    for band in bands:
        part = group_norm_stats(band, groups)
        total = part if total is None else total.merged(part)
    assert total is not None, "a map has at least one band"
    return total


def affine(norm: nn.GroupNorm, statistics: Moments) -> tuple[Tensor, Tensor]:
    """Scale and shift (B, C, 1, 1) such that x * scale + shift is the norm of x."""
    size = norm.num_channels // norm.num_groups
    mean, rstd = (t.repeat_interleave(size, 1) for t in (statistics.mean, (statistics.var + norm.eps).rsqrt()))
    scale = rstd if norm.weight is None else rstd * norm.weight.to(rstd.dtype)
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(shift.dtype)
    return scale[..., None, None], shift[..., None, None]
