"""What the samplers share: their signature, the walk over the noise levels, and the steps they are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from hires.protocols import Denoiser
from hires.sampling.noise import Noise, drawn

OnStep = Callable[[int, Tensor], None]


class Sampler(Protocol):
    """From x (B, C, h, w) at noise level sigmas[0] to the latents at sigmas[-1]; dtype and device of x are kept.

    `sigmas` (n + 1,) fall; scalar coefficients are float64. `on_step(i, denoised)` is called once for each of n steps
    (dpm_adaptive: for each step it accepts).
    """

    def __call__(
        self, denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Any, noise: Noise, on_step: OnStep | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    """Noise added before a step (Karras et al. 2022, algorithm 2), for s_tmin <= sigma <= s_tmax; s_churn 0 adds none."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0


CALM = Churn()


def pairs(sigmas: Tensor) -> list[tuple[float, float]]:
    """(sigma, sigma') of every step, float64."""
    return list(itertools.pairwise(sigmas.double().tolist()))


def report(on_step: OnStep | None, step: int, denoised: Tensor) -> None:
    if on_step is not None:
        on_step(step, denoised)


def toward(x: Tensor, x0: Tensor, sigma: float, target: float) -> Tensor:
    """x + (x - x0) / sigma (target - sigma): Euler in sigma, which is DDIM and DPM-Solver++(1) as well."""
    return x + (x - x0) * ((target - sigma) / sigma)


def ancestral(sigma: float, following: float, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): where to step down to, and the noise to add there, so that the level becomes `following`.

    sigma_up = min(sigma', eta sqrt(sigma'^2 (sigma^2 - sigma'^2) / sigma^2)), sigma_down^2 = sigma'^2 - sigma_up^2.
    """
    up = min(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return max(following**2 - up**2, 0.0) ** 0.5, up


def churned(x: Tensor, sigma: float, step: int, steps: int, churn: Churn, noise: Noise) -> tuple[Tensor, float]:
    """x raised to sigma (1 + gamma), gamma = min(s_churn / steps, sqrt(2) - 1), and that level."""
    gamma = min(churn.s_churn / steps, 2**0.5 - 1) if churn.s_tmin <= sigma <= churn.s_tmax else 0.0
    if gamma == 0:
        return x, sigma
    raised = sigma * (1 + gamma)
    return x + drawn(noise, x, step) * (churn.s_noise * (raised**2 - sigma**2) ** 0.5), raised


def heun_step(denoise: Denoiser, x: Tensor, sigma: float, following: float, cond: Any) -> tuple[Tensor, Tensor]:
    """Euler, then the mean of the slopes at both ends; to sigma 0 only Euler. Returns x' and the first estimate."""
    x0 = denoise(x, sigma, cond)
    slope = (x - x0) / sigma
    ahead = x + slope * (following - sigma)
    if following > 0:
        slope = (slope + (ahead - denoise(ahead, following, cond)) / following) / 2
        ahead = x + slope * (following - sigma)
    return ahead, x0


def midpoint_step(denoise: Denoiser, x: Tensor, x0: Tensor, levels: tuple[float, float], cond: Any) -> Tensor:
    """Euler from sigma to sqrt(sigma sigma'), then the slope found there over the whole step (DPM-Solver-2); to 0 Euler."""
    sigma, following = levels
    if following == 0:
        return toward(x, x0, sigma, 0.0)
    middle = math.sqrt(sigma * following)
    ahead = toward(x, x0, sigma, middle)
    return x + (ahead - denoise(ahead, middle, cond)) * ((following - sigma) / middle)
