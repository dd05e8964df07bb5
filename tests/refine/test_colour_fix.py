"""Colour fixes: what a picture takes from its reference and what it keeps, whole and in bands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hires.refine.colour_fix import ColourStatistics, adain, wavelet_fixed
from hires.tiling.geometry import Box, Size
from hires.tiling.resize import Enlarged
from hires.tiling.vae import WholePicture


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def cut(x: Tensor, rows: list[int]) -> list[Tensor]:
    assert sum(rows) == x.shape[-2]
    return list(x.split(rows, -2))


def spline_blurred(x: Tensor, levels: int) -> Tensor:
    """The a-trous low band by one separable kernel in float64, edges repeated."""
    taps = np.ones(1)
    for level in range(levels):
        spread = np.zeros(2 * 2**level + 1)
        spread[[0, 2**level, -1]] = 0.25, 0.5, 0.25
        taps = np.convolve(taps, spread)
    reach = len(taps) // 2
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    rows = sum(t * padded[:, :, k : k + x.shape[-2]] for k, t in enumerate(taps))
    return torch.from_numpy(sum(t * rows[..., k : k + x.shape[-1]] for k, t in enumerate(taps)))


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_the_low_band_is_the_references_and_the_rest_the_pictures(levels: int) -> None:
    x, reference = noise(1, 3, 71, 45), noise(1, 3, 71, 45, seed=1)
    found = torch.cat(list(wavelet_fixed([x], WholePicture(reference), levels)), -2).double()
    wanted = (x.double() - spline_blurred(x, levels)) + spline_blurred(reference, levels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 30), st.integers(1, 4))
def test_bands_of_any_height_are_the_whole_picture_bit_for_bit(rows: list[int], width: int, levels: int) -> None:
    x, reference = noise(1, 3, sum(rows), width), WholePicture(noise(1, 3, sum(rows), width, seed=1))
    whole = torch.cat(list(wavelet_fixed([x], reference, levels)), -2)
    banded = torch.cat(list(wavelet_fixed(cut(x, rows), reference, levels)), -2)
    assert banded.shape == x.shape
    assert torch.equal(banded, whole)


def test_rows_leave_as_soon_as_what_they_need_is_there() -> None:
    x, reference, sent = noise(1, 3, 60, 8), WholePicture(noise(1, 3, 60, 8, seed=1)), 0

    def bands():  # type: ignore[no-untyped-def]
        nonlocal sent
        for band in cut(x, [10] * 6):
            sent += 10
            yield band

    done = 0
    for out in wavelet_fixed(bands(), reference, 3):
        done += out.shape[-2]
        assert done >= sent - 7  # 2^3 - 1 rows are held back
    assert done == 60


def test_a_tint_goes_and_detail_stays() -> None:
    base = noise(1, 3, 12, 15)
    size = Size(96, 120)
    reference = Enlarged(base, size, Box(0, 0, 96, 120))
    detail = noise(1, 3, 96, 120, seed=2)
    detail = detail - spline_blurred(detail, 5).float()
    tinted = reference.crop(Box(0, 0, 96, 120)) + detail + torch.tensor([0.3, -0.2, 0.1])[None, :, None, None]
    found = torch.cat(list(wavelet_fixed(cut(tinted, [32, 32, 32]), reference)), -2)
    wanted = reference.crop(Box(0, 0, 96, 120)) + detail
    left = found - wanted  # the low band that the detail has of its own
    assert left.mean((-2, -1)).abs().max() < 0.005 and left.square().mean().sqrt() < 0.03


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(2, 30))
def test_moments_of_bands_are_those_of_the_whole(rows: list[int], width: int) -> None:
    x = noise(2, 3, sum(rows), width) * 3 + 1e4  # far from zero: sums of squares would lose the deviation
    found = ColourStatistics.of(cut(x, rows))
    torch.testing.assert_close(found.mean, x.double().mean((-2, -1), keepdim=True), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.std, x.double().std((-2, -1), keepdim=True, correction=0), rtol=1e-8, atol=1e-9)
    assert found.count == sum(rows) * width


def test_adain_gives_every_channel_the_references_mean_and_deviation() -> None:
    x, reference = noise(1, 3, 37, 53) * 2 + 0.4, noise(1, 3, 20, 25, seed=1) * 0.3 - 0.1
    own, wanted = ColourStatistics.of(cut(x, [20, 17])), ColourStatistics.of([reference])
    bands = [adain(band, own, wanted) for band in cut(x, [20, 17])]
    found = ColourStatistics.of(bands)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.std, wanted.std, rtol=1e-5, atol=0)
    assert torch.equal(torch.cat(bands, -2), adain(x, own, wanted))
    flat = adain(torch.full((1, 3, 4, 4), 0.7), ColourStatistics.of([torch.full((1, 3, 4, 4), 0.7)]), wanted)
    torch.testing.assert_close(flat, wanted.mean.float().expand(1, 3, 4, 4), rtol=0, atol=1e-6)
