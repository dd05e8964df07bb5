"""The signature of samplers, and the steps that several of them share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from hires.protocols import Condition, Denoiser
from hires.sampling.noise import StepNoise

OnStep = Callable[[int, Tensor], None]
"""Called after each step with its index and the denoised estimate; may raise to cancel."""


class Sampler(Protocol):
    """A sampler: takes latents from one noise level down to another."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        cond: Condition | None,
        noise: StepNoise,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The latents at sigmas[-1], with the dtype and device of x.

        Args:
            denoise: the denoised estimate.
            x: (B, C, h, w) at noise level sigmas[0].
            sigmas: (n + 1,), falling; scalar coefficients are computed in float64.
            cond: passed on to `denoise`.
            noise: what noise to add, where the sampler adds any.
            on_step: called once for each of the n steps (by dpm_adaptive for each step that it accepts).
        """
        ...


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """(sigma, sigma') of every step, float64."""
    return list(itertools.pairwise(sigmas.double().tolist()))


def report(on_step: OnStep | None, step: int, denoised: Tensor) -> None:
    """Call `on_step`, if there is one."""
    if on_step is not None:
        on_step(step, denoised)


def toward(x: Tensor, x0: Tensor, sigma: float, target: float) -> Tensor:
    """X + (x - x0) / sigma (target - sigma): an Euler step in sigma, which equals DDIM and DPM-Solver++(1)."""
    return x + (x - x0) * ((target - sigma) / sigma)


def ancestral(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): the level to step down to, and the noise to add there to reach level `following`.

    sigma_up = min(sigma', eta sqrt(sigma'^2 (sigma^2 - sigma'^2) / sigma^2)), sigma_down^2 = sigma'^2 - sigma_up^2.
    """
    up = min(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return max(following**2 - up**2, 0.0) ** 0.5, up


def churned(x: Tensor, sigma: float, step: int, steps: int, noise: StepNoise) -> tuple[Tensor, float]:
    """X with noise added up to level sigma (1 + gamma), gamma = min(s_churn / steps, sqrt(2) - 1), and that level."""
    gamma = min(noise.s_churn / steps, 2**0.5 - 1) if noise.s_tmin <= sigma <= noise.s_tmax else 0.0
    if gamma == 0:
        return x, sigma
    raised = sigma * (1 + gamma)
    return noise.added(x, step, (raised**2 - sigma**2) ** 0.5), raised


def heun_step(denoise: Denoiser, x: Tensor, sigma: float, following: float, cond: Condition | None) -> tuple[Tensor, Tensor]:
    """One step by the mean of the slopes at both ends; Euler if `following` is 0. Returns x' and the first estimate."""
    x0 = denoise(x, sigma, cond)
    slope = (x - x0) / sigma
    ahead = x + slope * (following - sigma)
    if following > 0:
        slope = (slope + (ahead - denoise(ahead, following, cond)) / following) / 2
        ahead = x + slope * (following - sigma)
    return ahead, x0


def midpoint_step(denoise: Denoiser, x: Tensor, x0: Tensor, levels: tuple[float, float], cond: Condition | None) -> Tensor:
    """One step by the slope at sqrt(sigma sigma'), which an Euler step reaches (DPM-Solver-2); Euler if sigma' is 0."""
    sigma, following = levels
    if following == 0:
        return toward(x, x0, sigma, 0.0)
    middle = math.sqrt(sigma * following)
    ahead = toward(x, x0, sigma, middle)
    return x + (ahead - denoise(ahead, middle, cond)) * ((following - sigma) / middle)
