from __future__ import annotations

import numpy as np
import pytest

from hires.sampling.multi_step import adams_weights


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_weights_integrate_polynomials_exactly(order: int) -> None:
    """sum_j w_j p(t_j) is the integral of p over the step for every polynomial below the order, on uneven levels."""
    levels = [2.0, 3.1, 5.5, 6.0, 9.7]  # the next level, then this one and those before
    weights = adams_weights(levels, order)
    assert len(weights) == order
    for power in range(order):
        integral = (levels[0] ** (power + 1) - levels[1] ** (power + 1)) / (power + 1)
        assert np.dot(weights, np.array(levels[1 : order + 1]) ** power) == pytest.approx(integral, rel=1e-12)


def test_lms_weights_on_even_levels_are_adams_bashforth() -> None:
    assert adams_weights([4.0, 3.0, 2.0, 1.0, 0.0], 4) == pytest.approx([55 / 24, -59 / 24, 37 / 24, -9 / 24])
