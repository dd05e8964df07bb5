"""Noise schedules as plain numbers: `steps + 1` falling levels, the last one 0.

Every schedule has the signature `(steps, sigma_min, sigma_max, table)`. Schedules of timesteps read `table`, the rising
sigmas of a checkpoint's timesteps 0, 1, ..., and begin at `sigma_max`, which may lie inside the table; the others ignore
`table`. Which parameterisation can use which schedule is in `registry.py`. Imports no torch, because plans count the levels.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from hires.errors import RequestError
from hires.sampling.registry import LCM_TIMESTEPS, TURBO_TIMESTEPS, find_schedule_name

Table = Sequence[float]


class Levels(Protocol):
    """A noise schedule."""

    def __call__(self, steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
        """The noise levels, `steps + 1` from the highest down to 0. RequestError if the table lacks timesteps."""
        ...


def make_levels(
    schedule: str,
    steps: int,
    *,
    sigma_min: float,
    sigma_max: float,
    table: Table | None = None,
    start: float | None = None,
    discard_penultimate: bool = False,
) -> list[float]:
    """The noise levels of a run, ending with 0.

    Args:
        schedule: a name or alias of a schedule.
        steps: the steps of the run.
        sigma_min: the model's lowest noise level.
        sigma_max: the model's highest noise level.
        table: the rising sigmas of the checkpoint's timesteps, if it has any.
        start: begin at this sigma instead of `sigma_max`, for a relay or img2img.
        discard_penultimate: use a schedule of one more step and drop its last level before 0.

    RequestError for an unknown name, a start out of range, a missing table or more steps than the table has timesteps.
    """
    top = sigma_max if start is None else start
    if not (math.isfinite(top) and sigma_min < top <= sigma_max):
        raise RequestError(f"start {top:g}: give a sigma above {sigma_min:g} and at most {sigma_max:g}")
    if steps < 1:
        raise RequestError(f"steps {steps}: give at least 1")
    make = LEVELS[find_schedule_name(schedule)]
    if not discard_penultimate:
        return make(steps, sigma_min, top, table)
    levels = make(steps + 1, sigma_min, top, table)
    return [*levels[:-2], levels[-1]]


def karras(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, *, rho: float = 7.0) -> list[float]:
    """sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _closed([(high + share * (low - high)) ** rho for share in _ramp(steps)])


def exponential(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """sigma_i = max (min / max)^(i/(n-1)): equal steps of ln sigma, as recommended for CosXL."""
    return _closed([sigma_max * (sigma_min / sigma_max) ** share for share in _ramp(steps)])


def polyexponential(
    steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, *, rho: float = 1.0
) -> list[float]:
    """Ln sigma_i = ln min + (1 - i/(n-1))^rho (ln max - ln min): exponential for rho 1 (k-diffusion)."""
    return _closed([sigma_min * (sigma_max / sigma_min) ** ((1 - share) ** rho) for share in _ramp(steps)])


def cosine(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """Sigma = tan(phi), phi linear: equal steps on the circle x = cos(phi) x0 + sin(phi) n of an EDM-v model."""
    high, low = math.atan(sigma_max), math.atan(sigma_min)
    return _closed([math.tan(high + share * (low - high)) for share in _ramp(steps)])


def linear(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """'Normal': t_i from that of sigma_max to 0 in equal steps, both ends included; ln sigma linear between timesteps."""
    top = _top(table, sigma_max)
    return _at([top * (1 - i / max(steps - 1, 1)) for i in range(steps)], table, sigma_max)


def linspace(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """t_i = round(t_max (1 - i/n)): 20 steps [999, 949, ..., 100, 50], as diffusers' DPM-Solver spaces them for PixArt."""
    top = _top(table, sigma_max)
    return _at([top, *(round(top * (1 - i / steps)) for i in range(1, steps))], table, sigma_max)


def sgm_uniform(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """t_i = t_max (1 - i/n): `linear` of n + 1 steps without its last level."""
    top = _top(table, sigma_max)
    return _at([top * (1 - i / steps) for i in range(steps)], table, sigma_max)


def simple(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """t_i = t_max - floor(i (t_max + 1) / n): timesteps at equal distances from the top."""
    top = _top(table, sigma_max)
    return _at([top - math.floor(i * (top + 1) / steps) for i in range(steps)], table, sigma_max)


def trailing(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """t_i = round((t_max + 1) (1 - i/n)) - 1 (Lin et al. 2023, table 2): 1 step [999], 4 steps [999, 749, 499, 249]."""
    top = _top(table, sigma_max)
    return _at([top, *(round((top + 1) * (1 - i / steps)) - 1 for i in range(1, steps))], table, sigma_max)


def ddim_uniform(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """'Leading': t_i = (n - 1 - i) floor((t_max + 1) / n) + 1, so 951, ..., 1 for 20 steps: it begins below sigma_max.

    A single step begins at sigma_max; the formula would give t = 1, with almost no noise.
    """
    top = _top(table, sigma_max)
    if steps == 1:
        return _at([top], table, sigma_max)
    spacing = int((top + 1) // steps)
    offset = 1 if (steps - 1) * spacing + 1 <= top else 0
    return _at([(steps - 1 - i) * spacing + offset for i in range(steps)], table)


def beta(
    steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, *, a: float = 0.6, b: float = 0.6
) -> list[float]:
    """t_i = t_max q(1 - i/n), q the quantiles of Beta(a, b): dense at both ends (Lee et al. 2024, arXiv 2407.12173).

    Timesteps stay fractions, ln sigma linear between, so that n steps are n levels.
    """
    top = _top(table, sigma_max)
    quantiles = beta_quantiles([1 - i / steps for i in range(steps)], a, b)
    return _at([top * quantile for quantile in quantiles], table, sigma_max)


def lcm(
    steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, *, original: int = LCM_TIMESTEPS
) -> list[float]:
    """Evenly chosen from the `original` timesteps 19, 39, ..., 999 of an LCM's distillation: 4 steps [999, 759, 499, 259]."""
    top = _top(table, sigma_max)
    spacing = len(table or ()) // original
    known = [k * spacing - 1 for k in range(original, 0, -1) if k * spacing - 1 <= top + 1e-6]
    if steps > len(known):
        raise RequestError(
            f"steps {steps}: an LCM knows {len(known)} timesteps below sigma {sigma_max:g}: give at most {len(known)}"
        )
    return _at([known[i * len(known) // steps] for i in range(steps)], table)


def sd_turbo(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None) -> list[float]:
    """The first of the timesteps 999, 899, ..., 99: ComfyUI's SDTurboScheduler, whose 4 steps are [999, 899, 799, 699]."""
    top = _top(table, sigma_max)
    spacing = len(table or ()) // TURBO_TIMESTEPS
    known = [k * spacing - 1 for k in range(TURBO_TIMESTEPS, 0, -1) if k * spacing - 1 <= top + 1e-6]
    if steps > len(known):
        raise RequestError(
            f"steps {steps}: schedule sd_turbo has {len(known)} timesteps below sigma {sigma_max:g}: give at most "
            f"{len(known)}, or `schedule` trailing"
        )
    return _at(known[:steps], table)


def beta_quantiles(levels: Sequence[float], a: float, b: float) -> list[float]:
    """X with I_x(a, b) = q for each q, by bisection on the regularised incomplete beta function."""
    return [1.0 if level >= 1 else _beta_quantile(level, a, b) for level in levels]


def _beta_quantile(level: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _incomplete_beta(middle, a, b) < level:
            low = middle
        else:
            high = middle
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b): its power series where x <= 1/2, 1 - I_(1-x)(b, a) elsewhere (Abramowitz and Stegun 26.5.2, 26.5.4)."""
    return 1 - _beta_series(1 - x, b, a) if x > 0.5 else _beta_series(x, a, b)


def _beta_series(x: float, a: float, b: float) -> float:
    """x^a (1 - x)^b / (a B(a, b)) (1 + sum_k prod_(j<k) (a + b + j) / (a + 1 + j) x^(j+1)), for x <= 1/2."""
    total = term = 1.0
    for j in range(60):  # each term is below half of the one before, for a, b of order 1
        term = term * x * ((a + b + j) / (a + 1 + j))
        total = total + term
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    return float(x**a * (1 - x) ** b * total * scale)


def _ramp(steps: int) -> list[float]:
    """0 to 1 in equal steps, counted from both ends."""
    step = 1 / max(steps - 1, 1)
    return [step * i if i < steps / 2 else 1 - step * (steps - 1 - i) for i in range(steps)] if steps > 1 else [0.0]


def _closed(sigmas: list[float]) -> list[float]:
    return [*sigmas, 0.0]


def _top(table: Table | None, sigma: float) -> float:
    """The timestep, a fraction, at which a table reaches sigma; ln sigma is linear between timesteps."""
    if not table:
        raise RequestError("this schedule needs a checkpoint's timesteps, and this one has none: use karras or exponential")
    right = min(max(bisect_left(table, sigma * (1 - 1e-9)), 1), len(table) - 1)
    low, high = math.log(table[right - 1]), math.log(table[right])
    place = right - 1 + min(max((math.log(sigma) - low) / (high - low), 0.0), 1.0)
    return float(round(place)) if abs(place - round(place)) < 1e-6 else place


def _at(times: Sequence[float], table: Table | None, first: float | None = None) -> list[float]:
    """The sigmas of falling timesteps; `first` replaces the first one exactly. RequestError if two coincide."""
    values = table or ()
    sigmas = []
    for time in times:
        left = min(max(int(time), 0), len(values) - 2)
        share = time - left
        sigmas.append(values[left] if share == 0 else values[left] ** (1 - share) * values[left + 1] ** share)
    if first is not None:
        sigmas[0] = first
    if min(times) < 0 or any(b >= a for a, b in itertools.pairwise(sigmas)):
        raise RequestError(
            f"steps {len(times)}: more than the timesteps below sigma {sigmas[0]:g}: give at most "
            f"{int(max(times)) + 1}, or `schedule` exponential"
        )
    return _closed(sigmas)


LEVELS: dict[str, Levels] = {
    "karras": karras,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "cosine": cosine,
    "linear": linear,
    "linspace": linspace,
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "trailing": trailing,
    "sd_turbo": sd_turbo,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "lcm": lcm,
}
