"""The Restart sampler: returns to a higher noise level to drop earlier errors.

Xu et al. 2023 (arXiv 2306.14878): the ODE is solved from t_max to t_min, noise of variance t_max^2 - t_min^2 is added, and
the interval is solved again. Levels and counts are those of the sampler that web interfaces call 'Restart'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from hires.protocols import Condition, Denoiser
from hires.sampling.base import OnStep, heun_step, report
from hires.sampling.noise import StepNoise

RHO = 7.0


def restart_list(steps: int) -> dict[float, tuple[int, int, float]]:
    """The restarts of a run, t_min: (noise levels per pass, passes, t_max); empty below 20 steps."""
    if steps >= 36:
        return {0.1: (steps // 4 + 1, 2, 2.0)}
    return {0.1: (10, 1, 2.0)} if steps >= 20 else {}


def restart_plan(steps: int, sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """The steps (sigma, sigma') of a run in order, `steps` in all; noise is added where a step begins above the last level.

    The passes' steps are taken from the schedule, which is shortened accordingly. A pass is a Karras schedule between the
    levels nearest to t_min and t_max. A schedule without room for a pass is walked once, unchanged.
    """
    whole = list(itertools.pairwise(sigmas))
    for t_min, (levels, passes, t_max) in restart_list(steps).items():
        base = shortened(sigmas, steps - (levels - 1) * passes)
        positive = [sigma for sigma in base if sigma > 0]
        bottom = min(range(len(positive)), key=lambda i: abs(positive[i] - t_min))
        top = min(range(len(positive)), key=lambda i: abs(positive[i] - t_max))
        if top >= bottom:
            return whole
        walk = list(itertools.pairwise(base))
        again = list(itertools.pairwise(spread(levels, positive[bottom], positive[top])))
        return walk[:bottom] + again * passes + walk[bottom:]
    return whole


def spread(count: int, low: float, high: float) -> list[float]:
    """`count` noise levels from high down to low at equal steps of sigma^(1/7), both ends as given."""
    a, b = high ** (1 / RHO), low ** (1 / RHO)
    return [high, *((a + i / (count - 1) * (b - a)) ** RHO for i in range(1, count - 1)), low]


def shortened(sigmas: Sequence[float], steps: int) -> list[float]:
    """A schedule of fewer steps between the same levels, interpolated over the index, linear in sigma^(1/7).

    Of a Karras schedule it is the Karras schedule with that many steps.
    """
    levels = [sigma ** (1 / RHO) for sigma in sigmas[:-1]]
    result = []
    for i in range(steps):
        place = i * (len(levels) - 1) / (steps - 1)
        left = min(int(place), len(levels) - 2)
        result.append((levels[left] + (place - left) * (levels[left + 1] - levels[left])) ** RHO)
    return [sigmas[0], *result[1:-1], sigmas[-2], sigmas[-1]]


def restart(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    cond: Condition | None,
    noise: StepNoise,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's steps along `restart_plan`; back up with sqrt(t_max^2 - t_min^2) n."""
    last = 0.0
    for i, (sigma, following) in enumerate(restart_plan(len(sigmas) - 1, sigmas.double().tolist())):
        if i and sigma > last:
            x = noise.added(x, i, (sigma**2 - last**2) ** 0.5)
        x, x0 = heun_step(denoise, x, sigma, following, cond)
        last = following
        report(on_step, i, x0)
    return x
