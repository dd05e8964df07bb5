"""Pictures with known statistics for the tests of measures, (H, W) float32 in or around [0, 1]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def textured(height: int, width: int, seed: int = 0) -> Floats:
    """A 1/f field of mean 0.5 and deviation 0.15, periodic."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    radius[0, 0] = 1
    picture = np.fft.irfft2(spectrum / radius, (height, width))
    return (0.5 + 0.15 * (picture - picture.mean()) / picture.std()).astype(np.float32)


def white(height: int, width: int, deviation: float, seed: int = 0) -> Floats:
    return (0.5 + deviation * np.random.default_rng(seed).standard_normal((height, width))).astype(np.float32)


def wave(height: int, width: int, amplitude: float, down: float, across: float) -> Floats:
    """A sinusoid of so many cycles per pixel down and across."""
    rows, cols = np.mgrid[:height, :width]
    return (0.5 + amplitude * np.cos(2 * np.pi * (rows * down + cols * across) + 0.4)).astype(np.float32)


def grey(picture: Floats) -> Floats:
    """(H, W) as (H, W, 3)."""
    return np.repeat(picture[..., None], 3, axis=2)


def coded(picture: Floats) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3) in [0, 1] as (H, W, 3) uint8."""
    colour = grey(picture) if picture.ndim == 2 else picture
    return (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)
