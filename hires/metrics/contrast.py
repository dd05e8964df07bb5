"""Measures a picture's contrast as a display would show it.

The ratio of relative luminances, RMS and a histogram, in one pass over boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hires.images.boxes import BoxSource, Doubles, Floats, Pixels, band_boxes, bits_of, unit, white_code

VIVID, FULL = 120.0, 300.0  # contrast ratios asked of displays; a picture below the first is called flat
LOWEST, PER_OCTAVE = -24, 512  # 2^-24 is below code 1 of 16 bits in blue alone; a bin is 0.14 % wide
BINS = 1 - LOWEST * PER_OCTAVE + 1  # black, the octaves up to 1, white
WEIGHTS = np.asarray((0.2126, 0.7152, 0.0722), dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """How far apart a picture's darkest and brightest tones are, in relative luminance.

    The marks 120:1 and 300:1 are of displays: the picture needs as much to use such a one in full.
    """

    ratio: float
    """P99.9 over P0.1 of the luminance, at most `ceiling`."""
    at_least: bool
    """Whether the ceiling hides what is beyond."""
    ceiling: float
    """White over code 1, what a picture of so many bits can tell from black; infinite for floats."""
    rms: float
    """The standard deviation of the luminance in [0, 1] (Peli 1990)."""
    dark: float
    """P0.1."""
    bright: float
    """P99.9."""
    histogram: NDArray[np.int64]
    """Pixels per bin of `octave_edges`."""

    @property
    def mark(self) -> str:
        """'flat' below 120:1, 'vivid' from there, 'full' from 300:1."""
        return "full" if self.ratio >= FULL else "vivid" if self.ratio >= VIVID else "flat"


def linear(coded: NDArray[np.floating]) -> Doubles:
    """The sRGB transfer function undone (IEC 61966-2-1): v / 12.92 up to 0.04045, ((v + 0.055) / 1.055)^2.4 above."""
    v = np.clip(coded.astype(np.float64), 0.0, 1.0)
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


@lru_cache(maxsize=2)
def _table(largest: int) -> Floats:
    table: Floats = linear(np.arange(largest + 1) / largest).astype(np.float32)
    return table


def relative_luminance(pixels: Pixels) -> Floats:
    """Y = 0.2126 R + 0.7152 G + 0.0722 B of linear sRGB, (H, W) float32 in [0, 1], of (H, W, 3) coded values."""
    if np.issubdtype(pixels.dtype, np.integer):
        channels = _table(white_code(pixels.dtype))[pixels.astype(np.intp)]
    else:
        channels = linear(unit(pixels)).astype(np.float32)
    light: Floats = channels @ WEIGHTS.astype(np.float32)
    return light


def ceiling_of(bits: int | None) -> float:
    """White over code 1: 3295:1 for 8 bits; infinite for floats."""
    return float("inf") if bits is None else float(1 / linear(np.asarray(1 / (2**bits - 1))))


def contrast(source: BoxSource) -> Contrast:
    """The contrast of a picture.

    A percentile is the mean of the luminances in its bin, so it is exact where they are equal and within 0.14 % elsewhere.
    """
    counts, sums, squares = np.zeros(BINS, dtype=np.int64), np.zeros(BINS), 0.0
    for box, _ in band_boxes(source.size):
        light = relative_luminance(source.read(box)).ravel()
        bins = luminance_bins(light)
        counts += np.bincount(bins, minlength=BINS)
        sums += np.bincount(bins, weights=light, minlength=BINS)
        squares += float(np.square(light, dtype=np.float64).sum())
    mean = sums.sum() / source.size.area
    dark, bright = _percentile(counts, sums, 0.001), _percentile(counts, sums, 0.999)
    ceiling = ceiling_of(bits_of(source))
    ratio = bright / dark if dark else float("inf") if bright else 1.0
    return Contrast(
        ratio=min(ratio, ceiling),
        at_least=ratio > ceiling,
        ceiling=ceiling,
        rms=float(np.sqrt(max(0.0, squares / source.size.area - mean**2))),
        dark=dark,
        bright=bright,
        histogram=counts,
    )


def luminance_bins(light: Floats) -> NDArray[np.intp]:
    """Bin 0 for black, then `PER_OCTAVE` per octave from 2^-24 up to 1."""
    with np.errstate(divide="ignore"):
        octave = np.log2(light)
    bins = np.floor((octave - np.float32(LOWEST)) * np.float32(PER_OCTAVE)) + 1
    inside: NDArray[np.intp] = np.clip(np.nan_to_num(bins, neginf=0), 0, BINS - 1).astype(np.intp)
    return inside


def octave_edges() -> Doubles:
    """Lower edges of the bins from bin 1 on, as relative luminance."""
    edges: Doubles = np.exp2(LOWEST + np.arange(BINS - 1) / PER_OCTAVE)
    return edges


def _percentile(counts: NDArray[np.int64], sums: Doubles, share: float) -> float:
    """The mean of the first bin at which at least that share of pixels is reached."""
    at = int(np.searchsorted(np.cumsum(counts), share * counts.sum() * (1 - 1e-12)))
    return float(sums[at] / counts[at])
