"""Single-step samplers: they use no estimates of earlier steps.

Safe with tile grids that move. Formulas in sigma space, x0 = denoise(x, sigma), after k-diffusion (Katherine Crowson, MIT
licence) and the papers named. All noise is drawn on the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hires.errors import RequestError
from hires.protocols import Condition, Denoiser
from hires.sampling.base import OnStep, ancestral, churned, heun_step, midpoint_step, pairs, report, toward
from hires.sampling.denoisers import timestep_of
from hires.sampling.noise import StepNoise, joined

DPMPP_SDE_R = 0.5
"""Where in a step dpmpp_sde's second evaluation is: at sigma^(1-r) sigma'^r."""
TCD_GAMMA = 0.3
"""How much of every step tcd draws anew: its authors' value for 4 steps."""


def euler(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """X' = x + (x - x0) / sigma (sigma' - sigma) (Karras et al. 2022, algorithm 2 without its second half)."""
    walk = pairs(sigmas)
    for i, (sigma, following) in enumerate(walk):
        x, raised = churned(x, sigma, i, len(walk), noise)
        x0 = denoise(x, raised, cond)
        x = toward(x, x0, raised, following)
        report(on_step, i, x0)
    return x


def euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler down to sigma_down, then noise up by sigma_up, where sigma_up^2 + sigma_down^2 = sigma'^2."""
    eta = noise.eta_or(1.0)
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        down, up = ancestral(sigma, following, eta)
        x = toward(x, x0, sigma, down)
        x = noise.added(x, i, up)
        report(on_step, i, x0)
    return x


def ddim(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """X' = x0 + sqrt(sigma'^2 - u^2) (x - x0) / sigma + u n, u^2 = eta^2 sigma'^2 (sigma^2 - sigma'^2) / sigma^2.

    Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16, divided by sqrt(abar'): the ancestral Euler step, Euler for eta 0.
    """
    return euler_ancestral(denoise, x, sigmas, cond, replace(noise, eta=noise.eta_or(0.0)), on_step)


def heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """The mean of the slopes at both ends of a step (Karras et al. 2022, algorithm 2); Euler to sigma 0."""
    walk = pairs(sigmas)
    for i, (sigma, following) in enumerate(walk):
        x, raised = churned(x, sigma, i, len(walk), noise)
        x, x0 = heun_step(denoise, x, raised, following, cond)
        report(on_step, i, x0)
    return x


def dpm_2(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """The slope at sqrt(sigma sigma') over the whole step (Lu et al. 2022, DPM-Solver-2); Euler to sigma 0."""
    walk = pairs(sigmas)
    for i, (sigma, following) in enumerate(walk):
        x, raised = churned(x, sigma, i, len(walk), noise)
        x0 = denoise(x, raised, cond)
        x = midpoint_step(denoise, x, x0, (raised, following), cond)
        report(on_step, i, x0)
    return x


def dpm_2_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver-2 down to sigma_down, then noise up by sigma_up."""
    eta = noise.eta_or(1.0)
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        down, up = ancestral(sigma, following, eta)
        x = midpoint_step(denoise, x, x0, (sigma, down), cond)
        if down > 0:
            x = noise.added(x, i, up)
        report(on_step, i, x0)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """U = (s / sigma) x - expm1(-h/2) x0 at s = sqrt(sigma sigma_down); x' = (sigma_down / sigma) x - expm1(-h) D(u, s).

    h = ln(sigma / sigma_down), then noise up by sigma_up (Lu et al. 2022, arXiv 2211.01095, the 2S solver with r = 1/2).
    """
    eta = noise.eta_or(1.0)
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        down, up = ancestral(sigma, following, eta)
        middle = (sigma * down) ** 0.5
        estimate = x0 if down == 0 else denoise(toward(x, x0, sigma, middle), middle, cond)
        x = toward(x, estimate, sigma, down)
        x = noise.added(x, i, up)
        report(on_step, i, x0)
    return x


def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """An ancestral step to s = sigma^(1-r) sigma'^r, then one over the whole step with (1 - 1/2r) x0 + (1/2r) D(u, s).

    Both follow one Brownian path: parts 0 and 1 of the noise are the increments from sigma to s and from s to sigma', and
    their sum is the noise of the whole step (see `noise.joined`).
    """
    eta, r = noise.eta_or(1.0), DPMPP_SDE_R
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        if following == 0:
            x = toward(x, x0, sigma, 0.0)
            report(on_step, i, x0)
            continue
        middle = sigma ** (1 - r) * following**r
        down, up = ancestral(sigma, middle, eta)
        ahead = toward(x, x0, sigma, down)
        ahead = noise.added(ahead, i, up)
        estimate = x0 + (denoise(ahead, middle, cond) - x0) * (1 / (2 * r))
        down, up = ancestral(sigma, following, eta)
        x = toward(x, estimate, sigma, down)
        if up > 0:
            path = joined(noise.unit(x, i), noise.unit(x, i, 1), (sigma - middle, middle - following))
            x = x + path * (up * noise.s_noise)
        report(on_step, i, x0)
    return x


def lcm(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """X' = x0 + sigma' n: the estimate with new noise; the last estimate unchanged (Luo et al. 2023, arXiv 2310.04378)."""
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        x = noise.added(x0.to(x.dtype), i, following)
        report(on_step, i, x0)
    return x


def tcd(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler down to timestep s = floor((1 - gamma) t'), then noise up to sigma' (Zheng et al. 2024, arXiv 2402.19159, alg. 4).

    gamma is `noise.eta`, 0.3 by default: 0 is DDIM, 1 almost LCM. The last step gives the estimate unchanged; upstream goes
    to timestep 0 there, whose sigma is 0.03. RequestError without the checkpoint's timesteps.
    """
    gamma = noise.eta_or(TCD_GAMMA)
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        down = tcd_level(noise.table, following, gamma)
        x = toward(x, x0, sigma, down)
        x = noise.added(x, i, math.sqrt(following**2 - down**2))
        report(on_step, i, x0)
    return x


def tcd_level(table: Sequence[float] | None, sigma: float, gamma: float) -> float:
    """The sigma of timestep floor((1 - gamma) t(sigma)); 0 for 0. RequestError without a table."""
    if sigma == 0:
        return 0.0
    if table is None:
        raise RequestError("sampler tcd counts a checkpoint's timesteps, and this one has none: take lcm or euler_ancestral")
    time = timestep_of(table)(sigma)
    whole = round(time)
    time = whole if abs(time - whole) < 1e-3 else time  # the timestep that a float32 sigma was made of
    return min(table[math.floor((1 - gamma) * time)], sigma)
