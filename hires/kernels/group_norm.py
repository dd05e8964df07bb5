"""GroupNorm in two steps: statistics, then scale, shift and SiLU.

Two steps allow statistics of more rows than are in memory: the moments of bands merge exactly (Chan, Golub and LeVeque 1979),
without the cancellation of E[x^2] - E[x]^2.
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
    """The mean and variance of each group of channels."""

    count: int
    """Values per group."""
    mean: Tensor
    """(B, G)."""
    var: Tensor
    """Biased, (B, G)."""

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of values; delta^2 n_a n_b / n is the term that separately normalised tiles lose."""
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / count
        var = self.var * (1 - share) + other.var * share + delta**2 * (share * (1 - share))
        return Moments(count, self.mean + delta * share, var)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSpec:
    """The facts of a call on maps (B, C, rows, W)."""

    device: str
    """The type of the device, such as 'cuda'."""
    dtype: torch.dtype
    """Of the map."""


class Stats(Protocol):
    """A backend of `group_norm_stats`."""

    def __call__(self, band: Tensor, groups: int, /) -> Moments:
        """The moments of a band."""
        ...


class Apply(Protocol):
    """A backend of `group_norm_apply`."""

    def __call__(self, x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype, /) -> Tensor:
        """X scale + shift, then SiLU if `silu`, in `dtype`."""
        ...


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stats_torch(band: Tensor, groups: int) -> Moments:
    """The PyTorch reference: moments per channel, then merged over the channels of each group."""
    per_channel = _var_mean(band.to(accumulator(band.dtype)))
    var, mean = (t.reshape(t.shape[0], groups, -1) for t in per_channel)
    centre = mean.mean(-1)
    spread = (mean - centre[..., None]).square().mean(-1)
    return Moments(band[0, 0].numel() * var.shape[-1], centre, var.mean(-1) + spread)


CACHED = 2**19  # values that stay in a core's cache between two passes


def _var_mean(band: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean (B, C) per channel.

    On a CPU torch.var_mean is a scalar loop, 8 times slower than two passes.
    """
    if band.device.type != "cpu":
        return torch.var_mean(band, dim=(2, 3), correction=0)
    mean = band.mean(dim=(2, 3), keepdim=True)
    total = torch.zeros_like(mean)
    for rows in band.split(max(1, CACHED // max(1, band[:, :, 0].numel())), dim=2):  # type: ignore[no-untyped-call]
        total += (rows - mean).square_().sum(dim=(2, 3), keepdim=True)
    return (total / band[0, 0].numel())[..., 0, 0], mean[..., 0, 0]


def apply_torch(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype) -> Tensor:
    """The PyTorch reference of `group_norm_apply`."""
    inner = accumulator(x.dtype)
    normed = torch.addcmul(shift, x, scale) if x.dtype == inner else x.to(inner).mul_(scale).add_(shift)
    del x
    if silu:
        normed = F.silu(normed, inplace=True)
    return normed.to(dtype)


def _stats_triton(band: Tensor, groups: int) -> Moments:
    from hires.kernels.triton_maps import stats_triton

    count, mean, squares = stats_triton(band, groups)  # (B, G, pieces) float32: per piece, with summed squared distances
    total = count.sum(-1)
    centre = (count * mean).sum(-1) / total
    spread = (squares + count * (mean - centre[..., None]).square()).sum(-1)
    return Moments(band[0, : band.shape[1] // groups].numel(), centre, spread / total)


def _apply_triton(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype) -> Tensor:
    from hires.kernels.triton_maps import apply_triton

    return apply_triton(x, scale, shift, silu, dtype)


def _torch_why_not(spec: MapSpec) -> str | None:
    return None if spec.dtype.is_floating_point else f"takes floating-point maps, not {spec.dtype}"


def _triton_why_not(spec: MapSpec) -> str | None:
    return elementwise_why_not(spec.device, spec.dtype)


STATS: tuple[Backend[MapSpec, Stats], ...] = (
    Backend(name="triton", why_not=_triton_why_not, run=_stats_triton),
    Backend(name="torch", why_not=_torch_why_not, run=stats_torch),
)
APPLY: tuple[Backend[MapSpec, Apply], ...] = (
    Backend(name="triton", why_not=_triton_why_not, run=_apply_triton),
    Backend(name="torch", why_not=_torch_why_not, run=apply_torch),
)


def group_norm_stats(band: Tensor, groups: int, *, backend: str | None = None) -> Moments:
    """The moments (B, G) of one band (B, C, rows, W) of any strides. ValueError if `groups` does not divide C."""
    if band.shape[1] % groups:
        raise ValueError(f"{band.shape[1]} channels are not {groups} groups")
    return choose(STATS, MapSpec(device=band.device.type, dtype=band.dtype), "group norm", backend).run(band, groups)


def group_norm_apply(
    x: Tensor, scale: Tensor, shift: Tensor, *, silu: bool, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """X scale + shift, then SiLU if `silu`: x (B, C, rows, W) of any strides, scale and shift (B, C, 1, 1).

    Computed in float32 (float64 for float64) and rounded once, to `dtype` or the dtype of x.
    """
    run, result_dtype = choose(APPLY, MapSpec(device=x.device.type, dtype=x.dtype), "group norm", backend).run, dtype or x.dtype
    held = [x]
    del x  # so that the backend can free the map as soon as it has a copy
    return run(held.pop(), scale, shift, silu, result_dtype)


def table(spec: MapSpec) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it cannot run the call; None if it can."""
    return reasons_of(STATS, spec)
