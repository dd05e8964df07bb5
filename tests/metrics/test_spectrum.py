"""Spectra and Laplacians against closed forms; gains against enlargements that add nothing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hires.images.boxes import ArraySource, LanczosSource, averaged, luma
from hires.metrics.spectrum import base_cutoff, block_for, median_of_nine, sharpness, spectrum
from hires.tiling.geometry import Size
from tests.support.pictures import coded, grey, textured, wave, white


@pytest.mark.parametrize(("size", "block"), [((300, 500), 128), ((301, 203), 101), ((512, 256), 256)])
def test_a_sinusoid_has_half_its_squared_amplitude_at_its_frequency(size: tuple[int, int], block: int) -> None:
    down, across, amplitude = 0.11, 0.17, 0.2
    found = spectrum(ArraySource(grey(wave(*size, amplitude, down, across))), block)
    radius = np.hypot(down, across)
    assert found.energy(0.0) == pytest.approx(amplitude**2 / 2, rel=0.02)
    assert found.energy(radius - 3 / block) == pytest.approx(amplitude**2 / 2, rel=0.02)
    assert found.energy(radius + 3 / block) < 1e-3 * amplitude**2
    frequency, power = found.radial()
    assert frequency[power.argmax()] == pytest.approx(radius, abs=1 / block)


@pytest.mark.parametrize("cutoff", [0.05, 0.125, 0.25, 0.4])
def test_white_noise_has_its_share_of_area(cutoff: float) -> None:
    """Beyond a radius f of the unit square of frequencies: 1 - pi f^2."""
    found = spectrum(ArraySource(grey(white(700, 500, 0.1))), 128)
    assert found.energy(cutoff) == pytest.approx(0.01 * (1 - np.pi * cutoff**2), rel=0.01)
    assert found.slope() == pytest.approx(0, abs=0.03)


def test_a_field_of_power_law_has_its_slope() -> None:
    assert spectrum(ArraySource(grey(textured(600, 900))), 256).slope() == pytest.approx(-2, abs=0.1)


def test_every_part_of_the_picture_counts_and_the_outermost_half_block_less() -> None:
    """The same square of noise in places of one picture; one window over all would forget the outer ones."""
    noise, found = white(100, 100, 0.1), []
    for top, left in ((0, 0), (40, 40), (200, 150), (250, 451), (337, 281)):
        picture = np.full((500, 600), 0.5, dtype=np.float32)
        picture[top : top + 100, left : left + 100] = noise
        found.append(spectrum(ArraySource(grey(picture)), 32).energy(0.2))
    level = 0.01 * (1 - np.pi * 0.04) / 30
    assert found[1:] == pytest.approx([level] * 4, rel=0.12)
    assert 0.7 * level < found[0] < level


def test_an_enlargement_has_nothing_beyond_its_base_and_the_gain_says_so() -> None:
    """Reference: 1/f fields enlarged four times keep under 2 % of their variance there; the field itself more."""
    picture = coded(textured(640, 960))
    base = np.rint(averaged(ArraySource(picture), Size(160, 240)) * 255).astype(np.uint8)
    size = Size(640, 960)
    cutoff = base_cutoff(size, Size(160, 240))
    assert cutoff == 0.125
    variance = sharpness(ArraySource(picture)).variance
    native = spectrum(ArraySource(picture)).energy(cutoff)
    enlarged = spectrum(LanczosSource(base, size)).energy(cutoff)
    bicubic = np.asarray(Image.fromarray(base).resize((960, 640), Image.Resampling.BICUBIC))
    assert enlarged / variance < 0.02 < native / variance
    assert native / enlarged > 10
    assert spectrum(ArraySource(bicubic)).energy(cutoff) / enlarged == pytest.approx(1, abs=0.5)


def test_blocks_resolve_the_cutoff() -> None:
    assert block_for(Size(4096, 4096), 0.125) == 256
    assert block_for(Size(4096, 8192), 1 / 64) == 512
    assert block_for(Size(4096, 8192), 1 / 1000) == 2048
    assert block_for(Size(100, 8192), 0.125) == 100


def test_the_median_of_nine_is_the_median() -> None:
    values = np.random.default_rng(0).random((13, 17)).astype(np.float32)
    wanted = [[np.median(values[y : y + 3, x : x + 3]) for x in range(15)] for y in range(11)]
    np.testing.assert_array_equal(median_of_nine(values), np.asarray(wanted, dtype=np.float32))


def test_a_median_takes_dead_pixels_and_leaves_waves() -> None:
    dead = np.full((300, 500), 0.5, dtype=np.float32)
    dead[::7, ::11] = 1
    assert spectrum(ArraySource(grey(dead)), 128).energy(0.1) > 1e-3
    assert spectrum(ArraySource(grey(dead)), 128, denoised=True).energy(0.1) < 1e-12
    slow = ArraySource(grey(wave(300, 500, 0.2, 0.02, 0.01)))
    assert spectrum(slow, 128, denoised=True).energy(0.0) == pytest.approx(0.02, rel=0.05)
    noise = ArraySource(grey(white(600, 500, 0.1)))
    assert spectrum(noise, 128, denoised=True).energy(0.125) < 0.15 * spectrum(noise, 128).energy(0.125)


@pytest.mark.parametrize("size", [(200, 300), (201, 6001)])
def test_variances_of_a_picture_and_of_its_laplacian(size: tuple[int, int]) -> None:
    """One band and several, against the whole; white noise has 20 times its variance, a wave (2 - 2 cos w)^2 of its own."""
    picture = grey(white(*size, 0.1))
    found = sharpness(ArraySource(picture))
    light = luma(picture).astype(np.float64)
    laplacian = (
        light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * light[1:-1, 1:-1]
    )  # the definition, on the whole
    assert found.variance == pytest.approx(light.var(), rel=1e-9)
    assert found.laplacian == pytest.approx(laplacian.var(), rel=1e-9)
    assert found.laplacian == pytest.approx(20 * 0.01, rel=0.03)
    period = 8
    waves = sharpness(ArraySource(grey(wave(48, 800, 0.2, 0, 1 / period))))
    assert waves.laplacian == pytest.approx((2 - 2 * np.cos(2 * np.pi / period)) ** 2 * 0.02, rel=0.01)


def test_pictures_of_a_row() -> None:
    assert sharpness(ArraySource(np.zeros((1, 9, 3), np.uint8))).laplacian == 0
