"""Measures of a picture that cannot be flattered.

Seams, energy beyond the base picture, disks, colours. Imports numpy only.

Pictures are (H, W, 3) uint8 or float in [0, 1]; luma is Rec. 709 on the coded values, (H, W) float32 in [0, 1].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hires.images.boxes import Floats


def psnr(a: NDArray[np.generic], b: NDArray[np.generic], peak: float) -> float:
    """10 log10(peak^2 / mean((a - b)^2)) in dB; infinite for equal arrays."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def drift(small: NDArray[np.generic], base: NDArray[np.generic]) -> float:
    """RMS of the difference of a picture, averaged down, to its base, over the base's standard deviation (of a sample)."""
    first = base.astype(np.float64)
    return float(np.sqrt(np.mean((small.astype(np.float64) - first) ** 2)) / first.std(ddof=1))


def band_energy(picture: Floats, cutoff: float) -> float:
    """Mean square of what lies at or above `cutoff` cycles per pixel (radially), Hann-windowed, mean removed.

    Above the Nyquist frequency of a base picture of b pixels enlarged to n: cutoff = b / (2 n).
    """
    h, w = picture.shape
    window = np.hanning(h).astype(np.float32)[:, None] * np.hanning(w).astype(np.float32)[None, :]
    spectrum = np.fft.rfft2((picture - picture.mean()) * window)
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :])
    twice = np.full(spectrum.shape[1], 2.0)  # the half plane that rfft2 leaves out
    twice[0] = 1.0
    if w % 2 == 0:
        twice[-1] = 1.0
    power = np.abs(spectrum) ** 2 * twice[None, :]
    return float(power[radius >= cutoff].sum() / (h * w) / (window.astype(np.float64) ** 2).sum())
