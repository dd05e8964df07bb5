"""Lanczos by rows: Pillow's numbers, for any size and any bands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hires.tiling.geometry import Size
from hires.tiling.resample import Resampled, WholeRows, lanczos_taps

SIZES = [(40, 33), (160, 132), (61, 300), (13, 7), (40, 99), (80, 33), (1, 1), (39, 34)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_pillows_lanczos(height: int, width: int) -> None:
    """On floats, where Pillow does not round: enlarged, reduced, and one axis each way."""
    plane = np.random.default_rng(0).random((40, 33), dtype=np.float32)
    expected = np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS))
    found = Resampled(WholeRows(torch.from_numpy(plane)[None]), Size(height, width)).rows(0, height)[0].numpy()
    assert np.abs(found - expected).max() < 2e-6


@given(st.integers(1, 50), st.integers(1, 300), st.lists(st.integers(1, 20), max_size=10))
@settings(max_examples=40, deadline=None)
def test_bands_are_those_of_the_whole(height: int, width: int, cuts: list[int]) -> None:
    picture = torch.rand(2, 17, 23, generator=torch.Generator().manual_seed(0))
    whole = Resampled(WholeRows(picture), Size(height, width)).rows(0, height)
    made, top, source = [], 0, Resampled(WholeRows(picture), Size(height, width))
    for rows in (*cuts, height):
        bottom = min(height, top + rows)
        if bottom > top:
            made.append(source.rows(top, bottom))
        top = bottom
    assert torch.allclose(torch.cat(made, 1), whole, atol=1e-6, rtol=0)


@given(st.integers(1, 200), st.integers(1, 200))
def test_weights_sum_to_one_and_lie_in_the_picture(source: int, target: int) -> None:
    low, high, weights = lanczos_taps(source, target, 0, target)
    assert 0 <= low < high <= source
    assert torch.allclose(weights.sum(1), torch.ones(target), atol=1e-6)


def test_the_same_size_is_the_same_picture() -> None:
    picture = torch.rand(3, 9, 11)
    assert torch.equal(Resampled(WholeRows(picture), Size(9, 11)).rows(2, 7), picture[:, 2:7])
