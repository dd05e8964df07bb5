from __future__ import annotations

import itertools
import math

import pytest
import torch

from hires.sampling.noise import CanvasNoise, StepNoise
from hires.sampling.restart import restart, restart_list, restart_plan, shortened, spread
from hires.sampling.samplers import exponential, karras
from hires.sampling.single_step import heun
from hires.tiling.geometry import Box
from tests.support.mixture import mixture


@pytest.mark.parametrize(
    ("steps", "table"),
    [
        (10, {}),
        (19, {}),
        (20, {0.1: (10, 1, 2.0)}),
        (35, {0.1: (10, 1, 2.0)}),
        (36, {0.1: (10, 2, 2.0)}),
        (42, {0.1: (11, 2, 2.0)}),
    ],
)
def test_the_table_by_steps(steps: int, table: dict[float, tuple[int, int, float]]) -> None:
    assert restart_list(steps) == table


@pytest.mark.parametrize(("steps", "base", "passes"), [(20, 11, 1), (35, 26, 1), (36, 18, 2), (42, 22, 2)])
def test_the_plan_takes_the_steps_asked_for(steps: int, base: int, passes: int) -> None:
    """A shortened schedule, broken at its level nearest to 0.1 by passes from its level nearest to 2."""
    sigmas = karras(steps, 0.03, 14.6).tolist()
    plan = restart_plan(steps, sigmas)
    assert len(plan) == steps
    jumps = [i for i in range(1, steps) if plan[i][0] != plan[i - 1][1]]
    assert len(jumps) == passes
    down = [pair for i, pair in enumerate(plan) if not jumps[0] <= i < jumps[0] + passes * restart_list(steps)[0.1][0] - passes]
    assert [sigma for sigma, _ in down] + [0] == pytest.approx(karras(base, 0.03, 14.6).tolist(), rel=1e-5, abs=1e-12)
    levels = karras(base, 0.03, 14.6)[:-1]
    for jump in jumps:
        assert plan[jump - 1][1] == pytest.approx(levels[(levels - 0.1).abs().argmin()].item(), rel=1e-5)
        assert plan[jump][0] == pytest.approx(levels[(levels - 2.0).abs().argmin()].item(), rel=1e-5)
        assert plan[jump][0] > 1.2
    again = plan[jumps[0] : jumps[0] + restart_list(steps)[0.1][0] - 1]
    ends = [sigma for sigma, _ in again] + [again[-1][1]]
    assert ends == pytest.approx(karras(len(ends), ends[-1], ends[0]).tolist()[:-1], rel=1e-5)


@pytest.mark.parametrize("sigmas", [karras(40, 0.01, 0.06), exponential(12, 0.03, 14.6), exponential(1, 0.03, 14.6)])
def test_without_room_for_a_pass_the_schedule_is_walked_as_it_is(sigmas: torch.Tensor) -> None:
    values = sigmas.tolist()
    assert restart_plan(len(values) - 1, values) == list(itertools.pairwise(values))


def test_a_shortened_schedule_keeps_its_ends_and_its_shape() -> None:
    short = shortened(exponential(40, 0.03, 14.6).tolist(), 20)
    assert short == pytest.approx(exponential(20, 0.03, 14.6).tolist(), rel=0.01)
    assert short[0] == exponential(40, 0.03, 14.6)[0].item()
    assert spread(5, 0.1, 2.0) == pytest.approx(karras(5, 0.1, 2.0).tolist()[:-1], rel=1e-6)


def test_below_20_steps_it_is_heun_and_above_it_draws_noise_once_per_pass() -> None:
    box, drawn = Box(0, 0, 4, 6), []
    noise = CanvasNoise(1, 0, box, 2)

    def recording(step: int, part: int = 0) -> torch.Tensor:
        drawn.append(step)
        return noise(step, part)

    x = noise(-1) * 15
    assert restart(mixture, x, karras(19, 0.03, 15.0), None, StepNoise(source=recording)).equal(
        heun(mixture, x, karras(19, 0.03, 15.0), None, StepNoise(source=noise))
    )
    assert drawn == []
    restart(mixture, x, karras(42, 0.03, 15.0), None, StepNoise(source=recording))
    assert len(drawn) == len(set(drawn)) == 2


def test_it_is_heun_down_noise_up_and_heun_again() -> None:
    """42 steps by hand: the shortened schedule to its level near 0.1, two passes from the level near 2, the rest."""
    noise = CanvasNoise(1, 0, Box(0, 0, 4, 6), 2)
    start, sigmas = noise(-1).double() * 15, karras(42, 0.03, 15.0)
    base = torch.tensor(shortened(sigmas.tolist(), 22), dtype=torch.float64)
    bottom, top = int((base[:-1] - 0.1).abs().argmin()), int((base[:-1] - 2.0).abs().argmin())
    low, high = base[bottom].item(), base[top].item()
    x = heun(mixture, start, base[: bottom + 1], None, StepNoise(source=noise))
    for step in (bottom, bottom + 10):
        x = x + noise(step).double() * math.sqrt(high**2 - low**2)
        x = heun(mixture, x, torch.tensor(spread(11, low, high), dtype=torch.float64), None, StepNoise(source=noise))
    x = heun(mixture, x, base[bottom:], None, StepNoise(source=noise))
    torch.testing.assert_close(restart(mixture, start, sigmas, None, StepNoise(source=noise)), x, rtol=0, atol=1e-12)


def test_noise_brings_the_level_back_up() -> None:
    """A denoiser that returns x leaves x alone, so what is added is all there is: sqrt(t_max^2 - t_min^2) n."""
    noise = CanvasNoise(1, 0, Box(0, 0, 8, 9), 4)
    sigmas = karras(20, 0.03, 15.0)
    plan = restart_plan(20, sigmas.tolist())
    jump = next(i for i in range(1, 20) if plan[i][0] > plan[i - 1][1])
    result = restart(lambda x, sigma, cond: x, torch.zeros(1, 4, 8, 9), sigmas, None, StepNoise(source=noise))
    added = noise(jump) * math.sqrt(plan[jump][0] ** 2 - plan[jump - 1][1] ** 2)
    torch.testing.assert_close(result, added, rtol=1e-6, atol=1e-6)
