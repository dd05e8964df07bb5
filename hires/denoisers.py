"""From a network to `denoise(x, sigma, cond) -> denoised`, and wrappers of that signature.

x and the result are (B, C, h, w) float32. Preconditioning is local and goes inside `tiled`; guidance is about the whole
picture and goes outside it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from hires.conditioning import Conditioning, concatenate


class Denoiser(Protocol):
    """The posterior mean estimate of the clean latents."""

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor: ...


class Network(Protocol):
    """A raw network: scaled input (B, C, h, w), time (a float in the network's own unit) and conditions to its output."""

    def __call__(self, x: Tensor, time: float, cond: Any) -> Tensor: ...


def edm_v(network: Network) -> Denoiser:
    """x0 = x / (s^2 + 1) - s / sqrt(s^2 + 1) F(x / sqrt(s^2 + 1), ln(s) / 4): CosXL, sigma_data = 1."""

    def denoise(x: Tensor, sigma: float, cond: Any) -> Tensor:
        scale = 1 / math.sqrt(sigma**2 + 1)
        output = network(x * scale, 0.25 * math.log(sigma), cond)
        return x * scale**2 - output.float() * (sigma * scale)

    return denoise


def eps(network: Network, sigmas: Sequence[float]) -> Denoiser:
    """x0 = x - s F(x / sqrt(s^2 + 1), t(s)): SDXL; t by linear interpolation in ln sigma over the rising table."""
    logs = [math.log(sigma) for sigma in sigmas]

    def time(sigma: float) -> float:
        level = math.log(sigma)
        right = min(max(bisect_left(logs, level), 1), len(logs) - 1)
        low, high = logs[right - 1], logs[right]
        return right - 1 + min(max((level - low) / (high - low), 0.0), 1.0)

    def denoise(x: Tensor, sigma: float, cond: Any) -> Tensor:
        return x - network(x / math.sqrt(sigma**2 + 1), time(sigma), cond).float() * sigma

    return denoise


def guided(denoise: Denoiser, uncond: Conditioning, scale: float) -> Denoiser:
    """D = D_u + scale (D_c - D_u): classifier-free guidance, both estimates in one batch of 2B. Scale 1 costs one."""
    if scale == 1.0:
        return denoise

    def guide(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        both = denoise(x.repeat(2, 1, 1, 1), sigma, concatenate([cond, uncond]))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guide
