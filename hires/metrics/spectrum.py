"""Measures fine detail: a picture's spectrum, and its Laplacian's variance.

Spectra are Welch's: the picture is cut into square blocks that overlap by half and cover it evenly, each has its weighted mean
taken off and is weighted by Hann's window, and the squared magnitudes of their Fourier transforms are averaged. So every part
of the picture counts, its outermost half block less; memory is that of one block; and a frequency is known to about 2 / block
cycles per pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hires.images.boxes import BoxSource, Doubles, Floats, band_boxes, luma
from hires.tiling.geometry import Box, Size, axis_starts

BLOCK = 256
LEAST_CUTOFF_BINS = 8  # bins below a cutoff, so that what leaks past it is that of Hann's far lobes


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectrum:
    """A picture's power by frequency; it sums to the picture's mean square around the blocks' means."""

    power: Doubles
    """Mean square per frequency (block, block // 2 + 1), rows by `fftfreq`, columns by `rfftfreq`; the half plane that is
    left out is counted in.
    """
    block: int
    """The side of a block in pixels."""

    def radius(self) -> Doubles:
        """Radial frequency of every entry, cycles per pixel."""
        cycles: Doubles = np.hypot(np.fft.fftfreq(self.block)[:, None], np.fft.rfftfreq(self.block)[None, :])
        return cycles

    def energy(self, cutoff: float) -> float:
        """Mean square of what lies at or above `cutoff` cycles per pixel, radially."""
        return float(self.power[self.radius() >= cutoff].sum())

    def radial(self) -> tuple[Doubles, Doubles]:
        """Frequencies 1 / block to 1 / 2 and the mean power per frequency on rings of width 1 / block around them."""
        ring = np.rint(self.radius() * self.block).astype(np.intp).ravel()
        twice = _halves(self.block)
        sums = np.bincount(ring, weights=self.power.ravel())
        counts = np.bincount(ring, weights=np.broadcast_to(twice, self.power.shape).ravel())
        last = self.block // 2 + 1
        return np.arange(1, last) / self.block, sums[1:last] / counts[1:last]

    def slope(self) -> float:
        """The exponent b of power ~ f^b by least squares in log-log, from 4 / block to 1 / 4 cycles per pixel.

        -2 for most photographs, far below for enlarged ones; 0 where there is no power.
        """
        frequency, power = self.radial()
        inside = (frequency >= 4 / self.block) & (frequency <= 0.25) & (power > 0)
        if inside.sum() < 2:
            return 0.0
        return float(np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0])


def _halves(block: int) -> Doubles:
    """How often each column of a half plane stands in the whole plane."""
    twice = np.full(block // 2 + 1, 2.0)
    twice[0] = 1.0
    if block % 2 == 0:
        twice[-1] = 1.0
    return twice


def base_cutoff(size: Size, base: Size) -> float:
    """The Nyquist frequency of a base picture enlarged to `size`, in cycles per pixel.

    base / (2 size), of the axis where it is higher.
    """
    return max(base.height / size.height, base.width / size.width) / 2


def block_for(size: Size, cutoff: float) -> int:
    """A power of two that resolves the cutoff, from 256 to 2048, or the picture's shorter side."""
    wanted = 1 << math.ceil(math.log2(LEAST_CUTOFF_BINS / cutoff))
    return min(max(BLOCK, min(wanted, 2048)), size.height, size.width)


def spectrum(source: BoxSource, block: int = BLOCK, denoised: bool = False) -> Spectrum:
    """Welch's spectrum of a picture's luma; `block` at most its shorter side. Every pixel is read about four times.

    denoised: of the luma's 3 x 3 median, which takes single pixels and most of a noise away and leaves edges.
    """
    window = np.sin(np.pi * (np.arange(block) + 0.5) / block) ** 2
    weights = (window[:, None] * window[None, :]).astype(np.float32)
    lefts = axis_starts(source.size.width, block, block // 2)
    tops = axis_starts(source.size.height, block, block // 2)
    total = np.zeros((block, block // 2 + 1))
    for top in tops:
        for left in lefts:
            total += _power(_block(source, Box(top, left, block, block), denoised), weights)
    scale = len(tops) * len(lefts) * block**2 * float(np.square(weights, dtype=np.float64).sum())
    return Spectrum(power=total * _halves(block) / scale, block=block)


def _block(source: BoxSource, box: Box, denoised: bool) -> Floats:
    """Luma of a box, or its medians, the picture's edges repeated."""
    if not denoised:
        return luma(source.read(box))
    top, left = max(0, box.top - 1), max(0, box.left - 1)
    bottom, right = min(source.size.height, box.bottom + 1), min(source.size.width, box.right + 1)
    outside = (top + 1 - box.top, box.bottom + 1 - bottom), (left + 1 - box.left, box.right + 1 - right)
    return median_of_nine(np.pad(luma(source.read(Box(top, left, bottom - top, right - left))), outside, mode="edge"))


def median_of_nine(rows: Floats) -> Floats:
    """The median of each pixel's 3 x 3 neighbourhood, (h, w) of (h + 2, w + 2).

    Of sorted columns, the median of the largest low, the middle of the middles and the smallest high.
    """
    a, b, c = rows[:-2], rows[1:-1], rows[2:]
    low, high = np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)
    middle = _middle(a, b, c)
    low = np.maximum(np.maximum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    high = np.minimum(np.minimum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    return _middle(low, _middle(middle[:, :-2], middle[:, 1:-1], middle[:, 2:]), high)


def _middle(a: Floats, b: Floats, c: Floats) -> Floats:
    middle: Floats = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    return middle


def _power(part: Floats, weights: Floats) -> Doubles:
    level = np.float32((part * weights).sum(dtype=np.float64) / weights.sum(dtype=np.float64))
    transform = np.fft.rfft2((part - level) * weights)
    power: Doubles = transform.real.astype(np.float64) ** 2 + transform.imag.astype(np.float64) ** 2
    return power


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharpness:
    """How much luma in [0, 1] varies from pixel to pixel; noise counts as sharpness here, so it is read beside the spectrum."""

    variance: float
    """The variance of luma."""
    laplacian: float
    """The variance of its 4-neighbour Laplacian (Pech-Pacheco 2000), 20 times that of white noise."""


def sharpness(source: BoxSource) -> Sharpness:
    """Both in one pass. 0 for a Laplacian without a pixel that has four neighbours."""
    light, edges = np.zeros(3), np.zeros(3)
    for box, before in band_boxes(source.size, before=1, after=1):
        rows = luma(source.read(box)).astype(np.float64)
        whole = rows.shape[0] - before - (1 if box.bottom < source.size.height else 0)
        light = _merged(light, rows[before : before + whole])
        if rows.shape[0] > 2 and rows.shape[1] > 2:
            around = rows[:-2, 1:-1] + rows[2:, 1:-1] + rows[1:-1, :-2] + rows[1:-1, 2:]
            edges = _merged(edges, around - 4 * rows[1:-1, 1:-1])
    return Sharpness(variance=float(light[2] / light[0]), laplacian=float(edges[2] / max(1.0, edges[0])))


def _merged(moments: Doubles, values: Doubles) -> Doubles:
    """Count, mean and sum of squares around it with more values taken in (Chan et al. 1983): no cancellation of squares."""
    count, mean, spread = moments
    own, away = values.mean(), values.mean() - mean
    both = count + values.size
    return np.asarray(
        (both, mean + away * values.size / both, spread + ((values - own) ** 2).sum() + away**2 * count * values.size / both)
    )
