"""GroupNorm in two halves, so that the statistics may be of more rows than are at hand: moments, then scale, shift and SiLU.

Moments merge exactly over bands (Chan, Golub and LeVeque 1979); E[x^2] - E[x]^2 is nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.kernels.backends import Backend, choose, reasons_of
from hires.kernels.probes import elementwise_why_not


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSpec:
    """The facts of a call on maps (B, C, rows, W)."""

    device: str
    dtype: torch.dtype


class Stats(Protocol):
    def __call__(self, band: Tensor, groups: int, /) -> Moments: ...


class Apply(Protocol):
    def __call__(self, x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype, /) -> Tensor: ...


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_torch(band: Tensor, groups: int) -> Moments:
    """Per channel first, then merged over the channels of each group."""
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


def apply_torch(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype) -> Tensor:
    inner = accumulator(x.dtype)
    normed = torch.addcmul(shift, x, scale) if x.dtype == inner else x.to(inner).mul_(scale).add_(shift)
    del x
    if silu:
        normed = F.silu(normed, inplace=True)
    return normed.to(dtype)


def _stats_triton(band: Tensor, groups: int) -> Moments:
    from hires.kernels.triton_maps import stats_triton

    count, mean, squares = stats_triton(band, groups)  # (B, G, splits), float32: of each piece, and its squared distances
    total = count.sum(-1)
    centre = (count * mean).sum(-1) / total
    spread = (squares + count * (mean - centre[..., None]).square()).sum(-1)
    return Moments(band[0, : band.shape[1] // groups].numel(), centre, spread / total)


def _apply_triton(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype) -> Tensor:
    from hires.kernels.triton_maps import apply_triton

    return apply_triton(x, scale, shift, silu, dtype)


def _anywhere(spec: MapSpec) -> str | None:
    return None if spec.dtype.is_floating_point else f"takes floating-point maps, not {spec.dtype}"


def _by_kernel(spec: MapSpec) -> str | None:
    return elementwise_why_not(spec.device, spec.dtype)


STATS: tuple[Backend[MapSpec, Stats], ...] = (
    Backend(name="triton", why_not=_by_kernel, run=_stats_triton),
    Backend(name="torch", why_not=_anywhere, run=stats_torch),
)
APPLY: tuple[Backend[MapSpec, Apply], ...] = (
    Backend(name="triton", why_not=_by_kernel, run=_apply_triton),
    Backend(name="torch", why_not=_anywhere, run=apply_torch),
)


def group_norm_stats(band: Tensor, groups: int, *, backend: str | None = None) -> Moments:
    """Moments (B, G) of one band (B, C, rows, W) of any strides; C is a multiple of `groups`."""
    if band.shape[1] % groups:
        raise ValueError(f"{band.shape[1]} channels are not {groups} groups")
    return choose(STATS, MapSpec(device=band.device.type, dtype=band.dtype), "group norm", backend).run(band, groups)


def group_norm_apply(
    x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """x scale + shift, then SiLU if wanted: x (B, C, rows, W) of any strides, scale and shift (B, C, 1, 1).

    Computed in float32 (float64 for float64) and rounded once, to `dtype` or that of x.
    """
    run, wanted = choose(APPLY, MapSpec(device=x.device.type, dtype=x.dtype), "group norm", backend).run, dtype or x.dtype
    held = [x]
    del x  # the way it runs may free the map as soon as it has another of it
    return run(held.pop(), scale, shift, silu, wanted)


def table(spec: MapSpec) -> list[tuple[str, str | None]]:
    """Every backend with its reason, None where it runs."""
    return reasons_of(STATS, spec)
