"""Measures of a picture that cannot be flattered: seams, energy beyond the base picture, disks, colours. numpy only.

Pictures are (H, W, 3) uint8 or float in [0, 1]; luma is Rec. 709 on the coded values, (H, W) float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hires.tiling.geometry import TileGrid

Floats = NDArray[np.float32]
REC709 = np.asarray((0.2126, 0.7152, 0.0722), dtype=np.float32)


def luma(picture: NDArray[np.generic]) -> Floats:
    """Luma (H, W) of a picture (H, W, 3)."""
    scale = np.float32(1 / 255) if picture.dtype == np.uint8 else np.float32(1)
    result: Floats = (picture.astype(np.float32) @ REC709) * scale
    return result


def psnr(a: NDArray[np.generic], b: NDArray[np.generic], peak: float) -> float:
    """10 log10(peak^2 / mean((a - b)^2)) in dB; infinite for equal arrays."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def seam_lines(grid: TileGrid, cell_px: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and columns, in pixels, where a tile begins or ends inside the picture."""

    def lines(starts: Sequence[int], tile: int, extent: int) -> tuple[int, ...]:
        edges = set(starts) | {start + tile for start in starts}
        return tuple(sorted(edge * cell_px for edge in edges if 0 < edge < extent))

    rows = lines(grid.tops, grid.tile.height, grid.canvas.height)
    return rows, lines(grid.lefts, grid.tile.width, grid.canvas.width)


CLIP_SIGMAS = 3.0


def seam_visibility(picture: Floats, rows: Sequence[int], cols: Sequence[int]) -> float:
    """RMS of the coherent step across the given lines over that of all other lines; about 1 without seams, 3 at most.

    The step across a line is the gradient there less the mean of the gradients on either side of it, averaged along each
    edge of the grid (so a faint but steady offset adds up and texture cancels). Steps count in robust standard deviations
    of their strip of the picture and at most `CLIP_SIGMAS`: one ridge or shore that happens to lie on a line is not a seam.
    """
    return _ratio(_steps(picture, cols, rows), _steps(picture.T, rows, cols))


def lattice_score(picture: Floats, pitch: int) -> float:
    """RMS of the steps across every line at a multiple of `pitch`, whole lines, over that of the others: how much a decoder's
    cells are seen; 1 means not at all."""
    rows, cols = (tuple(range(pitch, extent - 2, pitch)) for extent in picture.shape)
    return _ratio(_steps(picture, cols, ()), _steps(picture.T, rows, ()))


def _ratio(*steps: tuple[NDArray[np.float64], NDArray[np.float64]]) -> float:
    """RMS on the lines over RMS off them, of all directions together."""
    on, off = (np.concatenate(part) for part in zip(*steps, strict=True))
    return float(np.sqrt(np.mean(on**2) / np.mean(off**2)))


def _steps(picture: Floats, cols: Sequence[int], rows: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coherent steps across vertical lines at `cols` and at all other columns, per segment between `rows`, in robust sigmas."""
    gradient = np.diff(picture.astype(np.float64), axis=1)  # gradient[:, c - 1] is across the line at column c
    step = gradient[:, 1:-1] - (gradient[:, :-2] + gradient[:, 2:]) / 2  # step[:, c - 2] is at column c
    bounds = np.unique([0, *rows, picture.shape[0]])
    sums = np.add.reduceat(step, bounds[:-1], axis=0) / np.diff(bounds)[:, None]
    inner = [c - 2 for c in cols if 2 <= c < picture.shape[1] - 1]
    mask = np.zeros(sums.shape[1], dtype=bool)
    mask[inner] = True
    sigma = 1.4826 * np.median(np.abs(sums[:, ~mask]), axis=1, keepdims=True)
    sums = np.clip(sums / np.maximum(sigma, 1e-7), -CLIP_SIGMAS, CLIP_SIGMAS)  # 1e-7: float32 rounding of a luma
    return sums[:, mask].ravel(), sums[:, ~mask].ravel()


def seam_score(picture: Floats, rows: Sequence[int], cols: Sequence[int], seed: int = 0, fakes: int = 50) -> float:
    """Seam visibility at the true grid over its median at `fakes` random grids of the same pitch; 1 means no seam is seen.

    1.0 where there are no lines.
    """
    if not rows and not cols:
        return 1.0
    rng = np.random.default_rng(seed)
    controls = [
        seam_visibility(picture, _moved(rows, picture.shape[0], rng), _moved(cols, picture.shape[1], rng)) for _ in range(fakes)
    ]
    return seam_visibility(picture, rows, cols) / float(np.median(controls))


def _moved(lines: Sequence[int], extent: int, rng: np.random.Generator) -> tuple[int, ...]:
    """The same lines shifted together by a random offset, wrapped, none within 2 px of a true one."""
    if not lines:
        return ()
    true = np.asarray(lines)
    for _ in range(100):
        moved = (true + rng.integers(3, extent - 3)) % extent
        moved = moved[(moved > 2) & (moved < extent - 2)]
        if len(moved) and np.abs(moved[:, None] - true[None, :]).min() > 2:
            break
    return tuple(sorted(int(line) for line in moved))


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
