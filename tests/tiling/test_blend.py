from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hires.errors import RequestError
from hires.tiling.blend import KINDS, axis_weights, blend_weights
from hires.tiling.geometry import Size, make_grid
from tests.support.speed import examples


@settings(max_examples=examples(60, 150), deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 200), st.integers(1, 64), st.integers(1, 64), st.floats(0, 0.9), st.sampled_from(KINDS)
)
def test_law_1_weights_sum_to_one_on_any_grid(h: int, w: int, th: int, tw: int, share: float, kind: str) -> None:
    grid = make_grid(Size(h, w), Size(th, tw), int(share * min(th, tw, h, w)))
    weights = blend_weights(grid, kind)
    total = torch.zeros(h, w)
    for index, box in enumerate(grid.boxes()):
        part = weights.of(index)
        assert (part > 0).all()
        total[box.rows, box.cols] += part
    assert (total - 1).abs().max() <= 2e-6


def test_one_tile_weighs_exactly_one() -> None:
    for kind in KINDS:
        assert (axis_weights((0,), 37, 37, kind) == 1).all()


def test_the_core_of_a_tile_weighs_exactly_one() -> None:
    weights = axis_weights((0, 24, 48), 32, 80, "hann")
    assert (weights[1, 8:24] == 1).all()


def test_an_unknown_window_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown blend window 'han': did you mean 'hann'"):
        axis_weights((0,), 4, 4, "han")
