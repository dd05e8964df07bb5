"""Colour differences that people see: CIE L*a*b* and CIEDE2000 (CIE 142-2001)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hires.images.boxes import Doubles
from hires.metrics.contrast import linear

# Rows X, Y, Z of linear sRGB at D65 (IEC 61966-2-1); the white point is what (1, 1, 1) becomes, so that greys have no colour.
TO_XYZ = np.asarray(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)))
WHITE = TO_XYZ.sum(1)
EPSILON, KAPPA = 216 / 24389, 24389 / 27  # CIE 15:2004


def lab(coded: NDArray[np.floating]) -> Doubles:
    """L*a*b* (..., 3) of sRGB in [0, 1], (..., 3), D65."""
    xyz = linear(coded) @ TO_XYZ.T / WHITE
    f = np.where(xyz > EPSILON, np.cbrt(xyz), (KAPPA * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def ciede2000(first: Doubles, second: Doubles) -> Doubles:
    """dE00 (...) of L*a*b* colours (..., 3), all weights 1; symmetric. Sharma, Wu & Dalal 2005, equations 2 to 22."""
    (l1, c1, h1), (l2, c2, h2) = _primed(first, second)
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    coloured = c1 * c2 > 0
    turn = h2 - h1
    turn = np.where(turn > 180, turn - 360, np.where(turn < -180, turn + 360, turn)) * coloured
    apart = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    mean_h = np.where(np.abs(h1 - h2) <= 180, (h1 + h2) / 2, (h1 + h2 + np.where(h1 + h2 < 360, 360, -360)) / 2)
    mean_h = np.where(coloured, mean_h, h1 + h2)
    t = 1 - 0.17 * _cos(mean_h - 30) + 0.24 * _cos(2 * mean_h) + 0.32 * _cos(3 * mean_h + 6) - 0.20 * _cos(4 * mean_h - 63)
    dl = (l2 - l1) / (1 + 0.015 * (mean_l - 50) ** 2 / np.sqrt(20 + (mean_l - 50) ** 2))
    dc = (c2 - c1) / (1 + 0.045 * mean_c)
    dh = apart / (1 + 0.015 * mean_c * t)
    bend = np.radians(60 * np.exp(-(((mean_h - 275) / 25) ** 2)))
    rotation = -np.sin(bend) * 2 * _high_chroma(mean_c)
    difference: Doubles = np.sqrt(np.maximum(0.0, dl**2 + dc**2 + dh**2 + rotation * dc * dh))
    return difference


def _primed(first: Doubles, second: Doubles) -> tuple[tuple[Doubles, Doubles, Doubles], ...]:
    """L', C' and h' in degrees of both colours: a* stretched where both are nearly grey."""
    mean_c = (np.hypot(first[..., 1], first[..., 2]) + np.hypot(second[..., 1], second[..., 2])) / 2
    stretch = 1 + 0.5 * (1 - _high_chroma(mean_c))
    values = []
    for colour in (first, second):
        a, b = colour[..., 1] * stretch, colour[..., 2]
        values.append((colour[..., 0], np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360))
    return tuple(values)


def _high_chroma(chroma: Doubles) -> Doubles:
    seventh = chroma**7
    rising: Doubles = np.sqrt(seventh / (seventh + 25.0**7))
    return rising


def _cos(degrees: Doubles) -> Doubles:
    cosine: Doubles = np.cos(np.radians(degrees))
    return cosine
