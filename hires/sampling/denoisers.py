"""Preconditioning: turns a network into `denoise(x, sigma, cond) -> denoised`.

x and the result are (B, C, h, w) float32. Preconditioning is local and goes inside `tiled`; guidance concerns the whole
picture and goes outside.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import Tensor

from hires.protocols import Condition, Denoiser, Network


def edm_v(network: Network) -> Denoiser:
    """x0 = x / (s^2 + 1) - s / sqrt(s^2 + 1) F(x / sqrt(s^2 + 1), ln(s) / 4): CosXL, sigma_data = 1."""

    def denoise(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        scale = 1 / math.sqrt(sigma**2 + 1)
        output = network(x * scale, 0.25 * math.log(sigma), cond)
        return x * scale**2 - output.float() * (sigma * scale)

    return denoise


def eps(network: Network, sigmas: Sequence[float]) -> Denoiser:
    """x0 = x - s F(x / sqrt(s^2 + 1), t(s)): epsilon-prediction of SDXL, SD1.5 and PixArt.

    sigmas: the rising table of a VP schedule, one level per timestep.
    """
    time = timestep_of(sigmas)

    def denoise(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        return x - network(x / math.sqrt(sigma**2 + 1), time(sigma), cond).float() * sigma

    return denoise


def v(network: Network, sigmas: Sequence[float]) -> Denoiser:
    """x0 = x / (s^2 + 1) - s / sqrt(s^2 + 1) F(x / sqrt(s^2 + 1), t(s)): v-prediction (Salimans & Ho 2022).

    sigmas: the rising table of a VP schedule, one level per timestep.
    """
    time = timestep_of(sigmas)

    def denoise(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        scale = 1 / math.sqrt(sigma**2 + 1)
        return x * scale**2 - network(x * scale, time(sigma), cond).float() * (sigma * scale)

    return denoise


def x0(network: Network, sigmas: Sequence[float]) -> Denoiser:
    """x0 = F(x / sqrt(s^2 + 1), t(s)): a network that predicts the picture itself, as SDXL-Lightning's for one step does.

    sigmas: the rising table of a VP schedule, one level per timestep.
    """
    time = timestep_of(sigmas)

    def denoise(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        return network(x / math.sqrt(sigma**2 + 1), time(sigma), cond).float()

    return denoise


def timestep_of(sigmas: Sequence[float]) -> Callable[[float], float]:
    """t(sigma) by linear interpolation in ln sigma over the rising table, clamped to [0, len - 1]; a float."""
    logs = [math.log(sigma) for sigma in sigmas]

    def time(sigma: float) -> float:
        level = math.log(sigma)
        right = min(max(bisect_left(logs, level), 1), len(logs) - 1)
        low, high = logs[right - 1], logs[right]
        return right - 1 + min(max((level - low) / (high - low), 0.0), 1.0)

    return time


def consistency(denoise: Denoiser, sigmas: Sequence[float], sigma_data: float = 0.5, timestep_scale: float = 10.0) -> Denoiser:
    """D = c_skip(t) x / sqrt(s^2 + 1) + c_out(t) x0, the boundary condition of a consistency model (Luo et al. 2023).

    c_skip = d^2 / ((k t)^2 + d^2), c_out = k t / sqrt((k t)^2 + d^2) with d = sigma_data, k = timestep_scale.
    """
    time = timestep_of(sigmas)

    def bounded(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        scaled = timestep_scale * time(sigma)
        total = scaled**2 + sigma_data**2
        skip, out = sigma_data**2 / total, scaled / math.sqrt(total)
        return denoise(x, sigma, cond) * out + x * (skip / math.sqrt(sigma**2 + 1))

    return bounded
