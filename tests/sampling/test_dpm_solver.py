from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hires.errors import RunError
from hires.sampling.dpm_solver import AdaptiveSteps, StepControl, dpm_adaptive, fast_orders
from hires.sampling.noise import StepNoise
from hires.sampling.samplers import karras
from tests.support.mixture import mixture

X = torch.randn(1, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 15


def no_noise(step: int, part: int = 0) -> Tensor:
    raise AssertionError("no noise is drawn for eta 0")


@pytest.mark.parametrize("count", range(1, 40))
def test_fast_spends_the_evaluations_asked_for(count: int) -> None:
    orders = fast_orders(count)
    assert sum(orders) == count
    assert all(order == 3 for order in orders[:-2])


def test_a_tighter_tolerance_takes_more_evaluations_and_comes_closer() -> None:
    def run(rtol: float, atol: float) -> tuple[Tensor, int]:
        counted = []

        def counting(x: Tensor, sigma: float, cond: object) -> Tensor:
            counted.append(sigma)
            return mixture(x, sigma)

        result = dpm_adaptive(
            counting, X, karras(10, 0.03, 15.0), None, StepNoise(source=no_noise), steps=AdaptiveSteps(rtol=rtol, atol=atol)
        )
        return result, len(counted)

    exact, _ = run(1e-5, 1e-6)
    (loose, few), (tight, many) = run(0.05, 0.0078), run(0.005, 0.00078)
    assert few < many < 8 * few
    assert (tight - exact).abs().max() < (loose - exact).abs().max() / 4
    assert (loose - exact).abs().max() < 0.1


def test_steps_shrink_on_errors_and_grow_without() -> None:
    control = StepControl(0.1, 3)
    assert not control.accepts(100.0)
    assert control.h < 0.1
    before = control.h
    assert control.accepts(1e-3)
    assert control.h > before


def test_what_cannot_end_says_so() -> None:
    def broken(x: Tensor, sigma: float, cond: object) -> Tensor:
        return x * float("nan")

    with pytest.raises(RunError, match="at sigma 15 is not finite"):
        dpm_adaptive(broken, X, karras(10, 0.03, 15.0), None, StepNoise(source=no_noise))
    generator = torch.Generator().manual_seed(0)

    def erratic(x: Tensor, sigma: float, cond: object) -> Tensor:
        return torch.randn(x.shape, generator=generator) * 1e6

    with pytest.raises(RunError, match=r"took 1000 steps and is at sigma 1\d"):
        dpm_adaptive(erratic, X, karras(10, 0.03, 15.0), None, StepNoise(source=no_noise))
