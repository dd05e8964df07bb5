"""Multi-step samplers: they reuse the estimates of earlier steps.

One evaluation per step; for tile grids that do not move. Formulas in sigma space (x0 = denoise(x, sigma), t = -ln sigma,
h = t' - t) after k-diffusion (Katherine Crowson, MIT licence) and the papers named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hires.protocols import Condition, Denoiser
from hires.sampling.base import OnStep, pairs, report
from hires.sampling.noise import StepNoise


def lms(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
    *,
    order: int = 4,
) -> Tensor:
    """X' = x + sum_j c_j d_{i-j}, c_j the integral of the j-th Lagrange polynomial through the last `order` slopes."""
    levels = sigmas.double().tolist()
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, _) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        slopes = [(x - x0) / sigma, *slopes][:order]
        for weight, slope in zip(adams_weights(levels[: i + 2][::-1], len(slopes)), slopes, strict=True):
            x = x + slope * weight
        report(on_step, i, x0)
    return x


def adams_weights(levels: Sequence[float], order: int) -> list[float]:
    """The exact integrals from levels[1] to levels[0] of the Lagrange polynomials through levels[1], ..., levels[order]."""
    nodes = np.array(levels[1 : order + 1]) - levels[1]
    weights = []
    for j in range(order):
        others = np.delete(nodes, j)
        integral = np.polyint(np.poly(others)) if order > 1 else np.array([1.0, 0.0])
        weights.append(float(np.polyval(integral, levels[0] - levels[1]) / np.prod(nodes[j] - others)))
    return weights


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Tensor, cond: Condition | None, noise: StepNoise, on_step: OnStep | None = None
) -> Tensor:
    """X' = (sigma'/sigma) x - expm1(-h) D with D = (1 + 1/2r) x0 - (1/2r) x0_old, r = h_old / h (Lu et al. 2022)."""
    previous: Tensor | None = None
    step_before = 0.0
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        if following == 0:
            x = x0.to(x.dtype)
        else:
            step = float(np.log(sigma / following))
            estimate = x0
            if previous is not None:
                half = step / (2 * step_before)
                estimate = (1 + half) * x0 - half * previous
            x = (following / sigma) * x - float(np.expm1(-step)) * estimate
            previous, step_before = x0, step
        report(on_step, i, x0)
    return x


def dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
    *,
    solver: str = "midpoint",
) -> Tensor:
    """X' = (sigma'/sigma) e^(-eta h) x - expm1(-k) x0 + w (x0 - x0_old) / r + sigma' sqrt(-expm1(-2 eta h)) n.

    k = (1 + eta) h, r = h_old / h, w = -expm1(-k)/2 (midpoint) or 1 + expm1(-k)/k (heun); Lu et al. 2022, arXiv
    2211.01095, SDE-DPM-Solver++(2M).
    """
    eta = noise.eta_or(1.0)
    previous: Tensor | None = None
    before = 0.0
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        if following == 0:
            x = x0.to(x.dtype)
        else:
            h = math.log(sigma / following)
            k = h * (1 + eta)
            x = x * math.exp(-k) - x0 * math.expm1(-k)
            if previous is not None:
                weight = _phi_2(k) if solver == "heun" else -math.expm1(-k) / 2
                x = x + (x0 - previous) * (weight * h / before)
            x = noise.added(x, i, following * math.sqrt(-math.expm1(-2 * eta * h)))
            previous, before = x0, h
        report(on_step, i, x0)
    return x


def dpmpp_2m_sde_heun(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """`dpmpp_2m_sde` with the weight of the heun solver."""
    return dpmpp_2m_sde(denoise, x, sigmas, cond, noise, on_step, solver="heun")


def dpmpp_3m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
    *,
    curvature: float = 1.0,
) -> Tensor:
    """X' = e^(-k) x - expm1(-k) x0 + phi_2 d1 - phi_3 d2 + sigma' sqrt(-expm1(-2 eta h)) n, k = (1 + eta) h.

    d1 and d2 are the divided differences of the last three estimates over h, phi_2 = expm1(-k)/k + 1, phi_3 = phi_2/k -
    1/2. The last term has the sign of the Taylor expansion (the opposite of diffusers' scheduler) and, as published, half its
    size: without noise the order is 2, or 3 with `curvature` 2.
    """
    eta = noise.eta_or(1.0)
    estimates: list[Tensor] = []  # newest first
    steps: list[float] = []
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x0 = denoise(x, sigma, cond)
        if following == 0:
            x = x0.to(x.dtype)
        else:
            h = math.log(sigma / following)
            k = h * (1 + eta)
            x = x * math.exp(-k) - x0 * math.expm1(-k)
            x = _third_order(x, [x0, *estimates], [before / h for before in steps], k, curvature)
            x = noise.added(x, i, following * math.sqrt(-math.expm1(-2 * eta * h)))
            estimates, steps = [x0, *estimates][:2], [h, *steps][:2]
        report(on_step, i, x0)
    return x


def _third_order(x: Tensor, estimates: Sequence[Tensor], ratios: Sequence[float], k: float, curvature: float) -> Tensor:
    """X plus the terms of second and third order, as far as there are estimates.

    ratios: r_j = h_j / h of the earlier steps, newest first, as are the estimates.
    """
    if not ratios:
        return x
    slope = (estimates[0] - estimates[1]) / ratios[0]
    if len(ratios) == 1:
        return x + slope * _phi_2(k)
    bend = (slope - (estimates[1] - estimates[2]) / ratios[1]) / (ratios[0] + ratios[1])
    return x + (slope + bend * ratios[0]) * _phi_2(k) - bend * (curvature * (_phi_2(k) / k - 0.5))


def _phi_2(k: float) -> float:
    return math.expm1(-k) / k + 1


def unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
    *,
    order: int = 2,
) -> Tensor:
    """UniP predicts; UniC corrects with the estimate that the next step needs anyway (Zhao et al. 2023, arXiv 2302.04867).

    The B2(h) = expm1(-h) variant on x0, with lower orders at both ends, as in diffusers: two estimates, order 3.
    """
    walk = pairs(sigmas)
    estimates: list[Tensor] = []  # newest first
    times: list[float] = []
    before, used = x, 0
    for i, (sigma, following) in enumerate(walk):
        x0 = denoise(x, sigma, cond)
        time = -math.log(sigma)
        if used:
            x = _uni_step(before, [*estimates[:used], x0], [*times[:used], time], time)
        estimates, times = [x0, *estimates][:order], [time, *times][:order]
        before, used = x, min(order, len(walk) - i, i + 1)
        x = _uni_step(x, estimates[:used], times[:used], -math.log(following)) if following > 0 else x0.to(x.dtype)
        report(on_step, i, x0)
    return x


def _uni_step(x: Tensor, estimates: Sequence[Tensor], times: Sequence[float], target: float) -> Tensor:
    """X' = e^(-h) x - expm1(-h) (m_0 + sum_k w_k (m_k - m_0) / r_k), r_k = (t_k - t_0) / h.

    One step from t_0 to `target` with the estimates m_k at t_k, m_0 that of x. An estimate at the target itself, given last,
    makes it the corrector. A single other estimate gets weight 1/2, several get those that match the expansion.
    """
    h = target - times[0]
    scale = math.expm1(-h)
    combined = estimates[0]
    ratios = [(time - times[0]) / h for time in times[1:]]
    for weight, ratio, estimate in zip(_uni_weights(ratios, h), ratios, estimates[1:], strict=True):
        combined = combined + (estimate - estimates[0]) * (weight / ratio)
    return x * math.exp(-h) - combined * scale


def _uni_weights(ratios: Sequence[float], h: float) -> list[float]:
    """W with sum_k w_k r_k^(j-1) = j! phi_(j+1)(-h) / phi_1(-h) for j = 1, ..., K."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    first = phi = math.expm1(-h) / -h
    moments = []
    for j in range(1, len(ratios) + 1):
        phi = (1 / math.factorial(j) - phi) / h
        moments.append(math.factorial(j) * phi / first)
    powers = np.vander(np.array(ratios), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, np.array(moments))]
