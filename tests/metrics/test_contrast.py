"""Contrast and colour differences against closed forms and published pairs."""

from __future__ import annotations

import numpy as np
import pytest

from hires.images.boxes import ArraySource
from hires.metrics.ciede2000 import ciede2000, lab
from hires.metrics.contrast import BINS, contrast, linear, luminance_bins, octave_edges, relative_luminance
from tests.support.pictures import coded, textured

# Sharma, Wu & Dalal 2005, table 1: two colours in L*a*b* and their difference.
PAIRS = """
50.0000 2.6772 -79.7751 50.0000 0.0000 -82.7485 2.0425
50.0000 3.1571 -77.2803 50.0000 0.0000 -82.7485 2.8615
50.0000 2.8361 -74.0200 50.0000 0.0000 -82.7485 3.4412
50.0000 -1.3802 -84.2814 50.0000 0.0000 -82.7485 1.0000
50.0000 -1.1848 -84.8006 50.0000 0.0000 -82.7485 1.0000
50.0000 -0.9009 -85.5211 50.0000 0.0000 -82.7485 1.0000
50.0000 0.0000 0.0000 50.0000 -1.0000 2.0000 2.3669
50.0000 -1.0000 2.0000 50.0000 0.0000 0.0000 2.3669
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0009 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0010 7.1792
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0011 7.2195
50.0000 2.4900 -0.0010 50.0000 -2.4900 0.0012 7.2195
50.0000 -0.0010 2.4900 50.0000 0.0009 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0010 -2.4900 4.8045
50.0000 -0.0010 2.4900 50.0000 0.0011 -2.4900 4.7461
50.0000 2.5000 0.0000 50.0000 0.0000 -2.5000 4.3065
50.0000 2.5000 0.0000 73.0000 25.0000 -18.0000 27.1492
50.0000 2.5000 0.0000 61.0000 -5.0000 29.0000 22.8977
50.0000 2.5000 0.0000 56.0000 -27.0000 -3.0000 31.9030
50.0000 2.5000 0.0000 58.0000 24.0000 15.0000 19.4535
50.0000 2.5000 0.0000 50.0000 3.1736 0.5854 1.0000
50.0000 2.5000 0.0000 50.0000 3.2972 0.0000 1.0000
50.0000 2.5000 0.0000 50.0000 1.8634 0.5757 1.0000
50.0000 2.5000 0.0000 50.0000 3.2592 0.3350 1.0000
60.2574 -34.0099 36.2677 60.4626 -34.1751 39.4387 1.2644
63.0109 -31.0961 -5.8663 62.8187 -29.7946 -4.0864 1.2630
61.2901 3.7196 -5.3901 61.4292 2.2480 -4.9620 1.8731
35.0831 -44.1164 3.7933 35.0232 -40.0716 1.5901 1.8645
22.7233 20.0904 -46.6940 23.0331 14.9730 -42.5619 2.0373
36.4612 47.8580 18.3852 36.2715 50.5065 21.2231 1.4146
90.8027 -2.0831 1.4410 91.1528 -1.6435 0.0447 1.4441
90.9257 -0.5406 -0.9208 88.6381 -0.8985 -0.7239 1.5381
6.7747 -0.2908 -2.4247 5.8714 -0.0985 -2.2286 0.6377
2.0776 0.0795 -1.1350 0.9033 -0.0636 -0.5514 0.9082
"""


def two_tones(dark: int, bright: int, share: float = 0.5, height: int = 90, width: int = 130) -> np.ndarray:
    pixels = np.full((height, width, 3), bright, dtype=np.uint8)
    pixels.reshape(-1, 3)[: round(share * height * width)] = dark
    return pixels


@pytest.mark.parametrize(
    ("dark", "mark"), [(60, "flat"), (24, "flat"), (22, "vivid"), (12, "vivid"), (10, "full"), (1, "full")]
)
def test_two_tones_have_their_ratio_and_mark(dark: int, mark: str) -> None:
    """120:1 needs code 22.6 or less beside white, 300:1 code 11.0."""
    found = contrast(ArraySource(two_tones(dark, 255)))
    value = dark / 255
    wanted = 1 / (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    assert found.ratio == pytest.approx(wanted, rel=1e-5)
    assert (found.mark, found.at_least) == (mark, dark == 0)


def test_black_is_reported_as_the_ceiling_of_its_depth() -> None:
    eight = contrast(ArraySource(two_tones(0, 255)))
    assert (eight.ratio, eight.at_least) == (eight.ceiling, True)
    assert eight.ceiling == pytest.approx(3294.6)
    sixteen = contrast(ArraySource(two_tones(0, 255).astype(np.uint16) * 257))
    assert sixteen.ceiling == pytest.approx(65535 * 12.92)
    floats = contrast(ArraySource(two_tones(0, 255) / 255))
    assert floats.ratio == float("inf") == floats.ceiling
    assert contrast(ArraySource(two_tones(0, 0))).ratio == 1


def test_a_thousandth_of_dead_pixels_does_not_count_and_two_do() -> None:
    few, more = (contrast(ArraySource(two_tones(5, 200, share))) for share in (0.0009, 0.002))
    assert few.ratio == pytest.approx(1)
    assert more.ratio == pytest.approx(float(linear(np.asarray(200 / 255)) / linear(np.asarray(5 / 255))), rel=1e-5)


def test_a_checkerboard_has_rms_contrast_one_half() -> None:
    board = (np.indices((66, 100)).sum(0) % 2).astype(np.uint8) * 255
    assert contrast(ArraySource(np.repeat(board[..., None], 3, 2))).rms == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_percentiles_and_deviation_are_numpys(kind: type) -> None:
    """Several bands; a percentile within the width of a bin, 0.14 %."""
    rng = np.random.default_rng(0)
    colour = np.clip(textured(400, 3000)[..., None] + 0.1 * rng.standard_normal((400, 3000, 3)), 0.002, 0.99)
    pixels = colour.astype(np.float32) if kind is np.float32 else np.rint(colour * np.iinfo(kind).max).astype(kind)
    light = (linear(pixels / (1 if kind is np.float32 else np.iinfo(kind).max)) @ (0.2126, 0.7152, 0.0722)).ravel()
    found = contrast(ArraySource(pixels))
    dark, bright = np.percentile(light, (0.1, 99.9), method="inverted_cdf")
    assert found.dark == pytest.approx(dark, rel=0.0014)
    assert found.bright == pytest.approx(bright, rel=0.0014)
    assert found.rms == pytest.approx(light.std(), rel=1e-4)
    assert found.histogram.sum() == light.size
    np.testing.assert_allclose(relative_luminance(pixels).ravel(), light, rtol=1e-5, atol=1e-7)


def test_bins_hold_what_their_edges_say() -> None:
    edges = octave_edges()
    assert len(edges) == BINS - 1
    light = np.asarray([0.0, 1e-9, edges[0] * 1.0005, edges[5] * 1.0005, 0.9999, 1.0], dtype=np.float32)
    assert luminance_bins(light).tolist() == [0, 0, 1, 6, BINS - 2, BINS - 1]


def test_colour_differences_are_the_published_ones() -> None:
    table = np.asarray([[float(word) for word in line.split()] for line in PAIRS.strip().splitlines()])
    assert len(table) == 34
    first, second, wanted = table[:, :3], table[:, 3:6], table[:, 6]
    np.testing.assert_allclose(ciede2000(first, second), wanted, atol=5e-5)
    np.testing.assert_allclose(ciede2000(second, first), wanted, atol=5e-5)
    assert ciede2000(first, first).max() == 0


def test_lab_of_the_primaries() -> None:
    """Lindbloom's values for sRGB at D65, to the rounding of the matrix."""
    colours = np.asarray([(1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5)], dtype=np.float64)
    wanted = [(100, 0, 0), (0, 0, 0), (53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86), (53.39, 0, 0)]
    np.testing.assert_allclose(lab(colours), wanted, atol=0.03)


def test_one_grey_level_is_hardly_seen() -> None:
    pixels = coded(textured(40, 50)) / 255
    apart = ciede2000(lab(pixels), lab(np.clip(pixels + 1 / 255, 0, 1)))
    assert 0.1 < apart.mean() < 0.6
