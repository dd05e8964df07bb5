"""DPM-Solver with its own steps: dpm_fast and dpm_adaptive.

dpm_fast takes a fixed number of evaluations, dpm_adaptive steps as large as the error allows. Both integrate over
t = -ln sigma from the first of `sigmas` to the last positive one and ignore the levels between; the noise left at that level
stays, as published. Lu et al. 2022 (arXiv 2206.00927). The structure follows k-diffusion
(Copyright (c) 2022 Katherine Crowson, MIT licence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.linalg import vector_norm

from hires.errors import RunError
from hires.protocols import Condition, Denoiser
from hires.sampling.base import OnStep, ancestral, report
from hires.sampling.noise import StepNoise

MOST_ATTEMPTS = 1000  # steps of dpm_adaptive, accepted or not


@dataclass
class _Slopes:
    """eps(x, t) = (x - denoise(x, sigma)) / sigma at sigma = e^-t; keeps the last estimate and reports each one."""

    denoise: Denoiser
    cond: Condition | None
    on_step: OnStep | None = None
    count: int = 0
    denoised: Tensor | None = None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        self.denoised = self.denoise(x, math.exp(-t), self.cond)
        report(self.on_step, self.count, self.denoised)
        self.count += 1
        return (x - self.denoised) / math.exp(-t)


def _first(x: Tensor, eps: Tensor, t: float, target: float) -> Tensor:
    """X - sigma' expm1(h) eps, h = t' - t."""
    return x - eps * (math.exp(-target) * math.expm1(target - t))


def _second(slopes: _Slopes, x: Tensor, eps: Tensor, t: float, target: float, r: float = 0.5) -> tuple[Tensor, Tensor]:
    """`_first` - sigma' / 2r expm1(h) (eps_r - eps), and eps_r, the slope at t + r h."""
    h = target - t
    eps_r = slopes(_first(x, eps, t, t + r * h), t + r * h)
    return _first(x, eps, t, target) - (eps_r - eps) * (math.exp(-target) * math.expm1(h) / (2 * r)), eps_r


def _third(slopes: _Slopes, x: Tensor, eps: Tensor, t: float, target: float, eps_r: Tensor | None = None) -> Tensor:
    """`_first` - sigma' / r2 (expm1(h) / h - 1) (eps_2 - eps), where eps_r at t + h/3 leads to eps_2 at t + 2h/3."""
    h = target - t
    near, far = t + h / 3, t + 2 * h / 3
    if eps_r is None:
        eps_r = slopes(_first(x, eps, t, near), near)
    share = math.expm1(far - t) / (far - t) - 1
    x_far = _first(x, eps, t, far) - (eps_r - eps) * (math.exp(-far) * 2 * share)
    eps_far = slopes(x_far, far)
    return _first(x, eps, t, target) - (eps_far - eps) * (math.exp(-target) * 1.5 * (math.expm1(h) / h - 1))


def _ends(sigmas: Tensor) -> tuple[float, float]:
    """T of the first and of the last positive noise level."""
    levels = [sigma for sigma in sigmas.double().tolist() if sigma > 0]
    return -math.log(levels[0]), -math.log(levels[-1])


def _target(t: float, following: float, end: float, eta: float) -> tuple[float, float]:
    """(target, up): step from t to `target`, then noise of standard deviation `up` reaches the level of `following`."""
    if eta == 0:
        return following, 0.0
    down, _ = ancestral(math.exp(-t), math.exp(-following), eta)
    target = end if down == 0 else min(end, -math.log(down))
    return target, math.sqrt(max(math.exp(-2 * following) - math.exp(-2 * target), 0.0))


def _only_one(denoise: Denoiser, x: Tensor, t: float, cond: Condition | None, on_step: OnStep | None) -> Tensor:
    """The denoised estimate, for a schedule with a single noise level."""
    x0 = denoise(x, math.exp(-t), cond)
    report(on_step, 0, x0)
    return x0.to(x.dtype)


def dpm_fast(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """N evaluations in steps of equal length in t: of order 3, the last ones of the order that is left over.

    `on_step` is called for each of the n evaluations.
    """
    start, end = _ends(sigmas)
    if start == end:
        return _only_one(denoise, x, start, cond, on_step)
    slopes = _Slopes(denoise, cond, on_step)
    eta = noise.eta_or(0.0)
    orders = fast_orders(len(sigmas) - 1)
    times = np.linspace(start, end, len(orders) + 1).tolist()
    for i, order in enumerate(orders):
        t = times[i]
        target, up = _target(t, times[i + 1], end, eta)
        eps = slopes(x, t)
        if order == 1:
            x = _first(x, eps, t, target)
        elif order == 2:
            x, _ = _second(slopes, x, eps, t, target)
        else:
            x = _third(slopes, x, eps, t, target)
        x = noise.added(x, i, up)
    return x


def fast_orders(count: int) -> list[int]:
    """The orders of DPM-Solver-fast's steps, `count` evaluations in all (section 3.4 of the paper)."""
    threes, rest = divmod(count, 3)
    return [3] * (threes - 1) + [2, 1] if rest == 0 else [3] * threes + [rest]


@dataclass
class StepControl:
    """A PID controller of the step h: h <- h limit(E0^b1 E1^b2 E2^b3), E the inverse errors of this step and the last two.

    b1 = (p + i + d) / order, b2 = -(p + 2d) / order, b3 = d / order, limit(f) = 1 + atan(f - 1).
    """

    h: float
    """The next step in t."""
    order: float
    """The solver's."""
    p: float = 0.0
    """The proportional coefficient."""
    i: float = 1.0
    """The integral coefficient."""
    d: float = 0.0
    """The differential coefficient."""
    safety: float = 0.81
    """The least factor on h at which a step is accepted."""
    inverse: list[float] = field(default_factory=list)
    """The inverse errors so far, newest first; empty before the first step."""

    def accepts(self, error: float) -> bool:
        """Whether a step with that error is accepted; sets the next h either way."""
        now = 1 / (error + 1e-8)
        _, last, older = self.inverse or [now, now, now]
        powers = ((self.p + self.i + self.d) / self.order, -(self.p + 2 * self.d) / self.order, self.d / self.order)
        factor = 1 + math.atan(now ** powers[0] * last ** powers[1] * older ** powers[2] - 1)
        accepted = factor >= self.safety
        self.inverse = [now, now, last] if accepted else [now, last, older]
        self.h *= factor
        return accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveSteps:
    """How dpm_adaptive chooses its steps; k-diffusion's names and defaults."""

    order: int = 3
    """The order of the solver, 2 or 3; the result of the order below estimates its error."""
    rtol: float = 0.05
    """The relative tolerance: |low - high| is compared with max(atol, rtol max(|low|, |x before|))."""
    atol: float = 0.0078
    """The absolute tolerance."""
    h_init: float = 0.05
    """The first step in t."""
    pcoeff: float = 0.0
    """The controller's proportional coefficient."""
    icoeff: float = 1.0
    """The controller's integral coefficient."""
    dcoeff: float = 0.0
    """The controller's differential coefficient."""
    accept_safety: float = 0.81
    """The least factor on h at which a step is accepted."""


DEFAULT_STEPS = AdaptiveSteps()


def dpm_adaptive(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
    *,
    steps: AdaptiveSteps = DEFAULT_STEPS,
) -> Tensor:
    """Steps of two orders from the same evaluations; their difference over the whole canvas sets the next step.

    The number of evaluations is not known in advance; `on_step` is called for each accepted step. RunError if the error is
    not finite, or after `MOST_ATTEMPTS` steps.
    """
    start, end = _ends(sigmas)
    if start == end:
        return _only_one(denoise, x, start, cond, on_step)
    slopes = _Slopes(denoise, cond)
    eta = noise.eta_or(0.0)
    control = StepControl(
        h=steps.h_init,
        order=1.5 if eta else steps.order,
        p=steps.pcoeff,
        i=steps.icoeff,
        d=steps.dcoeff,
        safety=steps.accept_safety,
    )
    t, before, accepted = start, x, 0
    for _ in range(MOST_ATTEMPTS):
        if t >= end - 1e-5:
            return x
        following = min(end, t + control.h)
        target, up = _target(t, following, end, eta)
        eps = slopes(x, t)
        denoised = slopes.denoised
        low, high = _two_orders(slopes, x, eps, (t, target), steps.order)
        if not control.accepts(_error(low, high, before, steps, math.exp(-t))):
            continue
        before, x, t = low, high, following
        x = noise.added(x, accepted, up)
        assert denoised is not None
        report(on_step, accepted, denoised)
        accepted += 1
    raise RunError(
        f"dpm_adaptive took {MOST_ATTEMPTS} steps and is at sigma {math.exp(-t):.3g} only: use dpmpp_2m or another sampler"
    )


def _two_orders(slopes: _Slopes, x: Tensor, eps: Tensor, interval: tuple[float, float], order: int) -> tuple[Tensor, Tensor]:
    """The results of a step of order - 1 and of order, from the same evaluations."""
    t, target = interval
    if order == 2:
        return _first(x, eps, t, target), _second(slopes, x, eps, t, target)[0]
    low, eps_r = _second(slopes, x, eps, t, target, 1 / 3)
    return low, _third(slopes, x, eps, t, target, eps_r)


def _error(low: Tensor, high: Tensor, before: Tensor, steps: AdaptiveSteps, sigma: float) -> float:
    """The root mean square over the canvas of |low - high| / max(atol, rtol max(|low|, |before|))."""
    allowed = (steps.rtol * low.abs().maximum(before.abs())).clamp(min=steps.atol)
    error = float(vector_norm((low - high) / allowed)) / math.sqrt(low.numel())
    if not math.isfinite(error):
        raise RunError(f"dpm_adaptive: the denoised estimate at sigma {sigma:.3g} is not finite; try `dtype` bf16 or fp32")
    return error
