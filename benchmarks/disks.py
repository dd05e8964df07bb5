"""Suns and moons in pictures: found, counted and measured, for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hires.images.boxes import Floats, luma
from hires.metrics.fidelity import band_energy


def local_band_energy(picture: Floats, cutoff: float, away_from: Sequence[FoundDisk] = (), blocks: int = 8) -> float:
    """Mean of `band_energy` over blocks of 1 / `blocks` of each side that overlap by half, those that touch a disk left out.

    Every part of the picture counts alike. A disk's outline would count for what the rest of a dark picture has in texture,
    and by where it stands.
    """
    h, w = picture.shape
    unit = min(h, w)
    tall, wide = h // blocks, w // blocks
    found = []
    for top in range(0, h - tall + 1, max(1, tall // 2)):
        for left in range(0, w - wide + 1, max(1, wide // 2)):
            part = top / unit, left / unit, (top + tall) / unit, (left + wide) / unit
            if not any(_touches(disk, part, picture.shape, unit) for disk in away_from):
                found.append(band_energy(picture[top : top + tall, left : left + wide], cutoff))
    return float(np.mean(found))


def quiet_energy(picture: Floats, cutoff: float, blocks: int = 8) -> float:
    """The median of `band_energy` over blocks of 1 / `blocks` of a side that overlap by half: of the field, not of the few
    blocks that an object is in."""
    tall, wide = picture.shape[0] // blocks, picture.shape[1] // blocks
    tops, lefts = (range(0, n - part + 1, part // 2) for n, part in zip(picture.shape, (tall, wide), strict=True))
    return float(np.median([band_energy(picture[y : y + tall, x : x + wide], cutoff) for y in tops for x in lefts]))


def _touches(disk: FoundDisk, part: tuple[float, float, float, float], shape: tuple[int, ...], unit: int) -> bool:
    """Whether a disk, a fifth larger, reaches into a part (top, left, bottom, right) in units of the shorter side."""
    y, x = disk.y * shape[0] / unit, disk.x * shape[1] / unit
    nearest_y, nearest_x = min(max(y, part[0]), part[2]), min(max(x, part[1]), part[3])
    return bool(np.hypot(y - nearest_y, x - nearest_x) < 1.2 * disk.radius)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDisk:
    """A bright disk: centre as fractions of width and height, radius in units of the shorter side, 0 to 1 likeness."""

    x: float
    y: float
    radius: float
    likeness: float


DISK_RADII = tuple(0.0148 * 1.17**k for k in range(14))  # 0.015 to 0.114 of the shorter side: 4 to 29 px of 256
WORKING_PX = 256


def find_disks(picture: NDArray[np.generic], likeness: float = 0.88, contrast: float = 0.07) -> list[FoundDisk]:
    """Bright disks on a darker surround (a sun, a moon), strongest first.

    At about 256 px, for every centre and radius the pixels of a disk are set against those of a ring around it: likeness
    is the square root of the share of their variance that this split explains, contrast the difference of their means.
    """
    small = _shrink(luma(picture), WORKING_PX)
    found: list[FoundDisk] = []
    unit = min(small.shape)
    for radius in DISK_RADII:
        score, difference = _disk_scores(small, radius * unit)
        score = np.where(difference >= contrast, score, 0.0)
        for row, col in zip(*np.nonzero(score >= likeness), strict=True):
            x, y = (col + 0.5) / small.shape[1], (row + 0.5) / small.shape[0]
            found.append(FoundDisk(x=float(x), y=float(y), radius=radius, likeness=float(score[row, col])))
    found.sort(key=lambda disk: -disk.likeness)
    kept: list[FoundDisk] = []
    for disk in found:
        if all(_apart(disk, other, small.shape) for other in kept):
            kept.append(disk)
    return kept


def lopsided_disks(picture: NDArray[np.generic], disks: Sequence[FoundDisk]) -> list[FoundDisk]:
    """Clear bright blobs that are not among `disks` because they are not round enough: botched or half-drawn doubles.

    A double is about as bright as a disk; glitter on water, which is darker, is none.
    """
    unit = min(picture.shape[:2])
    shape = (picture.shape[0] / unit, picture.shape[1] / unit)
    blobs = find_disks(picture, likeness=0.78, contrast=0.14)
    least = DOUBLE_LIGHT * max((_light(picture, disk) for disk in disks), default=0.0)
    return [b for b in blobs if all(_apart(b, disk, shape) for disk in disks) and _light(picture, b) >= least]


DOUBLE_LIGHT = 0.8  # of the brightest disk


def _light(picture: NDArray[np.generic], disk: FoundDisk) -> float:
    """Mean luma of the square inside a disk."""
    half = 0.5 * disk.radius * min(picture.shape[:2])
    row, col = disk.y * picture.shape[0], disk.x * picture.shape[1]
    part = picture[int(max(0, row - half)) : int(row + half) + 1, int(max(0, col - half)) : int(col + half) + 1]
    return float(luma(part).mean())


def _apart(a: FoundDisk, b: FoundDisk, shape: tuple[float, ...]) -> bool:
    unit = min(shape)
    distance = np.hypot((a.x - b.x) * shape[1] / unit, (a.y - b.y) * shape[0] / unit)
    return bool(distance > 1.3 * max(a.radius, b.radius))


def _shrink(picture: Floats, side: int) -> Floats:
    """Area average by a whole factor so that the shorter side is at least `side` (or the picture as it is)."""
    by = max(1, min(picture.shape) // side)
    h, w = picture.shape[0] // by * by, picture.shape[1] // by * by
    result: Floats = picture[:h, :w].reshape(h // by, by, w // by, by).mean(axis=(1, 3))
    return result


def _disk_scores(picture: Floats, radius: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Likeness and contrast of a disk of that radius (px) at every centre; the part outside the picture is left out."""
    reach = int(np.ceil(1.6 * radius)) + 1
    offsets = np.arange(-reach, reach + 1)
    distance = np.hypot(offsets[:, None], offsets[None, :])
    disk = (distance <= radius - 0.5).astype(np.float64)
    ring = ((distance >= radius + 1.0) & (distance <= 1.6 * radius + 0.5)).astype(np.float64)
    image, there = picture.astype(np.float64), np.ones(picture.shape)
    stack = np.stack([there, image, image**2])
    count_in, sum_in, square_in = _correlate(stack, disk)
    count_out, sum_out, square_out = _correlate(stack, ring)
    mean_in, mean_out = sum_in / count_in.clip(1), sum_out / count_out.clip(1)
    total = count_in + count_out
    mean = (sum_in + sum_out) / total
    spread = square_in + square_out - total * mean**2
    between = count_in * (mean_in - mean) ** 2 + count_out * (mean_out - mean) ** 2
    likeness = np.sqrt(np.clip(between / np.maximum(spread, 1e-9), 0, 1))
    likeness[count_in < 0.9 * disk.sum()] = 0
    return likeness, mean_in - mean_out


def _correlate(stack: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correlation of each plane with a small symmetric kernel, same size, zero outside."""
    h, w = stack.shape[1:]
    full = (h + kernel.shape[0] - 1, w + kernel.shape[1] - 1)
    product = np.fft.rfft2(stack, full) * np.fft.rfft2(kernel, full)[None]
    half = kernel.shape[0] // 2
    return np.fft.irfft2(product, full)[:, half : half + h, half : half + w]


def third_of(x: float) -> str:
    """The third of the picture's width that a fraction lies in: left, middle or right."""
    return ("left", "middle", "right")[min(2, int(x * 3))]


def mean_colour(picture: NDArray[np.generic], rows: tuple[float, float], cols: tuple[float, float]) -> Floats:
    """Mean RGB in [0, 1] of a part of the picture given as fractions of its height and width."""
    h, w = picture.shape[:2]
    part = picture[int(rows[0] * h) : int(rows[1] * h), int(cols[0] * w) : int(cols[1] * w)]
    scale = 1 / 255 if picture.dtype == np.uint8 else 1.0
    result: Floats = (part.astype(np.float64).mean(axis=(0, 1)) * scale).astype(np.float32)
    return result
