"""Low-passes against float64 references written here, on sizes that are neither square nor divisible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hires.errors import RequestError
from hires.protocols import LowPass
from hires.refine.low_pass import Area, Fourier, Wavelet, area_axis, daubechies

PROJECTORS = (Wavelet(1), Wavelet(3), Wavelet(2, 1), Wavelet(3, 2), Fourier(1 / 16), Fourier(0.1), Fourier(0.25))
ALL = (*PROJECTORS, Area(8), Area(4), Area(2.5), Fourier(0.1, 4))


def canvas(h: int, w: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(h * 1000 + w))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ALL), st.integers(1, 90), st.integers(1, 90), st.floats(-5, 5))
def test_constants_pass_unchanged_at_any_size(low_pass: LowPass, h: int, w: int, value: float) -> None:
    flat = torch.full((1, 2, h, w), value)
    torch.testing.assert_close(low_pass(flat), flat, rtol=0, atol=3e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PROJECTORS), st.integers(1, 90), st.integers(1, 90))
def test_projectors_are_idempotent_and_orthogonal(low_pass: LowPass, h: int, w: int) -> None:
    x = canvas(h, w)
    low = low_pass(x)
    torch.testing.assert_close(low_pass(low), low, rtol=0, atol=5e-6)
    assert abs(float((low * (x - low)).mean())) < 1e-6  # what is left out has nothing in common with what is kept


@pytest.mark.parametrize("low_pass", ALL, ids=str)
def test_a_low_pass_is_linear_and_works_on_batches(low_pass: LowPass) -> None:
    x, y = canvas(37, 53, 3), canvas(53, 37, 3).mT
    torch.testing.assert_close(low_pass(2 * x - 3 * y), 2 * low_pass(x) - 3 * low_pass(y), rtol=0, atol=2e-5)
    torch.testing.assert_close(low_pass(x)[1:2], low_pass(x[1:2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("low_pass", [Area(2), Area(4), Wavelet(1, 1), Wavelet(3, 1)], ids=str)
def test_nyquist_is_gone_exactly_where_blocks_divide_the_canvas(low_pass: LowPass) -> None:
    rows, cols = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    for parity in (rows, cols, rows + cols):
        assert low_pass((1.0 - 2.0 * (parity % 2))[None, None]).abs().max() < 1e-6


@pytest.mark.parametrize("low_pass", [Wavelet(1), Wavelet(2, 3)], ids=str)
def test_nyquist_is_gone_inside_for_longer_wavelets(low_pass: LowPass) -> None:
    x = (1.0 - 2.0 * (torch.arange(97) % 2)).expand(1, 1, 71, 97)
    assert low_pass(x)[..., 25:-25].abs().max() < 1e-5


def test_the_finest_mode_of_a_mirrored_picture_is_gone_and_the_coarse_ones_stay() -> None:
    i = (torch.arange(45, dtype=torch.float64) + 0.5) * math.pi / 45
    finest, coarse = torch.cos(44 * i).float().expand(1, 1, 31, 45), torch.cos(4 * i).float().expand(1, 1, 31, 45)
    assert Fourier(0.25)(finest).abs().max() < 1e-6
    torch.testing.assert_close(Fourier(0.25)(coarse), coarse, rtol=0, atol=2e-6)  # 4 / 90 cycles per cell


@pytest.mark.parametrize("order", [None, 2, 4])
def test_fourier_is_the_fft_of_the_mirrored_picture(order: int | None) -> None:
    x, cutoff = canvas(26, 37).double(), 0.13
    twice = torch.cat([x, x.flip(-2)], -2)
    twice = torch.cat([twice, twice.flip(-1)], -1)
    f = torch.from_numpy(np.hypot(np.fft.fftfreq(52)[:, None], np.fft.fftfreq(74)[None, :]))
    response = (f <= cutoff).double() if order is None else 1 / (1 + (f / cutoff) ** (2 * order))
    wanted = torch.fft.ifft2(torch.fft.fft2(twice) * response).real[..., :26, :37]
    torch.testing.assert_close(Fourier(cutoff, order)(x).double(), wanted, rtol=0, atol=3e-6)


def test_area_is_average_pooling_then_bicubic_and_says_that_it_is_not_idempotent() -> None:
    x = canvas(32, 48)
    pooled = F.avg_pool2d(x, 4)
    wanted = F.interpolate(pooled, size=(32, 48), mode="bicubic", align_corners=False, antialias=True)
    found = Area(4)(x)
    torch.testing.assert_close(found[..., 8:-8, 8:-8], wanted[..., 8:-8, 8:-8], rtol=0, atol=1e-5)
    assert (Area(4)(found) - found).abs().max() > 1e-2


@pytest.mark.parametrize(("source", "target"), [(10, 4), (53, 7), (7, 7), (9, 1)])
def test_area_axis_is_the_integral_over_equal_parts(source: int, target: int) -> None:
    values = np.random.default_rng(1).normal(size=source)
    integral = np.interp(np.arange(target + 1) * source / target, np.arange(source + 1), np.concatenate([[0], values.cumsum()]))
    np.testing.assert_allclose(area_axis(source, target) @ values, np.diff(integral) * target / source, atol=1e-12)


@pytest.mark.parametrize("moments", range(1, 9))
def test_daubechies_filters_are_orthonormal_and_have_their_moments(moments: int) -> None:
    taps = np.asarray(daubechies(moments))
    assert len(taps) == 2 * moments and taps.sum() == pytest.approx(math.sqrt(2))
    for shift in range(moments):
        assert taps[2 * shift :] @ taps[: len(taps) - 2 * shift] == pytest.approx(float(shift == 0), abs=1e-9)
    high = taps * (-1.0) ** np.arange(len(taps))
    for degree in range(moments):
        assert abs(high @ np.linspace(0, 1, len(taps)) ** degree) < 1e-7


def test_daubechies_are_the_published_ones() -> None:
    root = math.sqrt(3)
    np.testing.assert_allclose(daubechies(2), np.asarray([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * math.sqrt(2)))
    np.testing.assert_allclose(daubechies(4)[:3], [0.2303778133, 0.7148465706, 0.6308807679], atol=1e-9)  # Daubechies 1992


@pytest.mark.parametrize(("levels", "moments"), [(1, 4), (2, 2), (3, 3)])
def test_inside_a_wavelet_is_the_filter_bank_with_only_its_coarsest_band(levels: int, moments: int) -> None:
    taps, length = np.asarray(daubechies(moments)), 256
    x = np.random.default_rng(2).normal(size=length)

    def analysed(signal: np.ndarray) -> np.ndarray:
        return np.asarray(
            [taps @ np.take(signal, np.arange(2 * k, 2 * k + len(taps)), mode="wrap") for k in range(len(signal) // 2)]
        )

    def synthesised(coarse: np.ndarray) -> np.ndarray:
        fine = np.zeros(2 * len(coarse))
        for k, value in enumerate(coarse):
            np.add.at(fine, np.arange(2 * k, 2 * k + len(taps)) % len(fine), value * taps)
        return fine

    coarse = x
    for _ in range(levels):
        coarse = analysed(coarse)
    for _ in range(levels):
        coarse = synthesised(coarse)
    down, up = Wavelet(levels, moments).factors(length)
    reach = (2**levels - 1) * (len(taps) - 1) + 1
    np.testing.assert_allclose((up @ (down @ x))[2 * reach : -2 * reach], coarse[2 * reach : -2 * reach], atol=1e-6)


def test_polynomials_pass_a_wavelet_up_to_the_edge() -> None:
    ramp = torch.linspace(-1, 1, 61) ** 3 + torch.linspace(0, 1, 61)
    x = ramp.expand(1, 1, 47, 61)
    torch.testing.assert_close(Wavelet(3, 4)(x), x, rtol=0, atol=2e-5)


def test_a_mirrored_edge_does_not_wrap() -> None:
    x = torch.zeros(1, 1, 64, 64)
    x[..., :4, :] = 1.0
    for low_pass in (Fourier(0.1, 2), Area(4), Wavelet(2)):
        assert low_pass(x)[..., -8:, :].abs().max() < 0.02


@pytest.mark.parametrize(
    "make", [lambda: Area(0.5), lambda: Area(math.nan), lambda: Wavelet(0), lambda: Fourier(0.0), lambda: Fourier(0.1, 0)]
)
def test_values_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(RequestError, match="give"):
        make()  # type: ignore[operator]
