"""Samplers as plain functions on the canvas: `sampler(denoise, x, sigmas, cond, noise=…, on_step=…) -> latents`.

x is (B, C, h, w) float32 at noise level sigmas[0]; the result is the latents at sigmas[-1]. A sampler sees no tile. All
noise is drawn on the canvas by `CanvasNoise`, so it does not depend on tiles, batches or threads. Formulas in sigma space
(x0 = denoised, t = -ln sigma, h = t' - t) after k-diffusion (MIT) and the papers named.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.denoisers import Denoiser
from hires.errors import RequestError, unknown
from hires.tiling.geometry import Box

OnStep = Callable[[int, Tensor], None]


class Noise(Protocol):
    """Unit Gaussian noise of the canvas for one sampler step."""

    def __call__(self, step: int) -> Tensor: ...


class CanvasNoise:
    """Unit Gaussian noise that is a pure function of (seed, stage, step, channel, row, column).

    The value at a cell does not depend on the canvas size, on tiles, batches, threads or the device: integers are hashed
    (the splitmix64 finaliser, Steele et al. 2014) and turned into normals by Box-Muller in float64 on the CPU.
    """

    def __init__(self, seed: int, stage: int, box: Box, channels: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.stage, self.box, self.channels, self.device = seed, stage, box, channels, device

    def __call__(self, step: int) -> Tensor:
        """Noise of a step, (1, C, h, w) float32; step -1 is the start."""
        values = canvas_noise(self.seed, self.stage, step, self.box, self.channels)
        return torch.from_numpy(values)[None].to(self.device)


def canvas_noise(seed: int, stage: int, step: int, box: Box, channels: int) -> NDArray[np.float32]:
    """The noise of `CanvasNoise` for a box of the canvas, (channels, height, width) float32."""
    key = _mix(_mix(_mix(np.uint64(seed & (2**64 - 1))) ^ np.uint64(stage)) ^ np.uint64(step + 1))
    rows = np.arange(box.top, box.bottom, dtype=np.uint64)[None, :, None]
    cols = np.arange(box.left, box.right, dtype=np.uint64)[None, None, :]
    planes = np.arange(channels, dtype=np.uint64)[:, None, None]
    bits = _mix(_mix((rows << np.uint64(32)) ^ cols ^ key) ^ (planes << np.uint64(56)))
    u1 = ((bits >> np.uint64(40)) + np.uint64(1)) * 2.0**-24  # (0, 1]
    u2 = (bits & np.uint64(0xFFFFFFFF)) * 2.0**-32
    normal: NDArray[np.float64] = np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2)
    return normal.astype(np.float32)


def _mix(z: Any) -> Any:
    """The splitmix64 finaliser on uint64 values; wrapping is wanted."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """x' = x + (x - x0) / sigma (sigma' - sigma)."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        x = x + (x - x0) * ((following - sigma) / sigma)
        _report(on_step, i, x0)
    return x


def euler_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, noise: Noise, on_step: OnStep | None = None
) -> Tensor:
    """Euler down to sigma_down, then noise up by sigma_up, where sigma_up^2 + sigma_down^2 = sigma'^2 (eta = 1)."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        up = min(following, (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
        down = max(following**2 - up**2, 0.0) ** 0.5
        x = x + (x - x0) * ((down - sigma) / sigma)
        if up > 0:
            x = x + noise(i) * up
        _report(on_step, i, x0)
    return x


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """Euler, then the mean of the slopes at both ends; the last step, to sigma 0, stays Euler."""
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        slope = (x - x0) / sigma
        ahead = x + slope * (following - sigma)
        if following > 0:
            slope = (slope + (ahead - denoise(ahead, following, cond)) / following) / 2
            ahead = x + slope * (following - sigma)
        x = ahead
        _report(on_step, i, x0)
    return x


def dpmpp_2m(denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, noise: Noise, on_step: OnStep | None = None) -> Tensor:
    """x' = (sigma'/sigma) x - expm1(-h) D with D = (1 + 1/2r) x0 - (1/2r) x0_old, r = h_old / h (Lu et al. 2022)."""
    previous: Tensor | None = None
    step_before = 0.0
    for i, (sigma, following) in enumerate(_pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        if following == 0:
            x = x0
        else:
            step = float(np.log(sigma / following))
            estimate = x0
            if previous is not None:
                half = step / (2 * step_before)
                estimate = (1 + half) * x0 - half * previous
            x = (following / sigma) * x - float(np.expm1(-step)) * estimate
            previous, step_before = x0, step
        _report(on_step, i, x0)
    return x


def _pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    values = sigmas.double().tolist()
    return list(itertools.pairwise(values))


def _report(on_step: OnStep | None, step: int, denoised: Tensor) -> None:
    if on_step is not None:
        on_step(step, denoised)


class Sampler(Protocol):
    def __call__(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, noise: Noise, on_step: OnStep | None = None
    ) -> Tensor: ...


SAMPLERS: dict[str, Sampler] = {"euler": euler, "euler_ancestral": euler_ancestral, "heun": heun, "dpmpp_2m": dpmpp_2m}
EVALUATIONS = {"heun": 2}  # of the denoiser per step, where it is not one


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; RequestError lists the known ones."""
    if name not in SAMPLERS:
        raise RequestError(unknown("sampler", name, SAMPLERS))
    return SAMPLERS[name]
