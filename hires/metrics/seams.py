"""Measures what is seen of a grid of tiles, against grids that nobody used.

Arrays are luma (H, W) float32 in [0, 1]; what takes a `BoxSource` reads it in bands, once, and holds only profiles: means of
the picture along each stretch of an edge, from which every step across every line follows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hires.images.boxes import BoxSource, Doubles, Floats, band_boxes, luma
from hires.tiling.geometry import TileGrid

CLIP_SIGMAS = 3.0
HARMONICS = 8  # of a lattice
FLAT_STEP = 1e-7  # float32 rounding of a luma


def seam_lines(grid: TileGrid, cell_px: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rows and columns, in pixels, where a tile begins or ends inside the picture."""

    def lines(starts: Sequence[int], tile: int, extent: int) -> tuple[int, ...]:
        edges = set(starts) | {start + tile for start in starts}
        return tuple(sorted(edge * cell_px for edge in edges if 0 < edge < extent))

    rows = lines(grid.tops, grid.tile.height, grid.canvas.height)
    return rows, lines(grid.lefts, grid.tile.width, grid.canvas.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seams:
    """How visible the edges of a grid are, against random grids."""

    score: float
    """`visibility` over `median`; 1 means that no seam is seen."""
    visibility: float
    """That of the grid."""
    median: float
    """The median visibility of random grids."""
    p_value: float
    """The chance that a picture without seams scores as high, (1 + fakes at or above) / (1 + fakes)."""
    fakes: int
    """How many random grids there were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """Means of a picture's luma along the stretches of a grid's edges, float64."""

    rows: tuple[int, ...]
    """The rows of horizontal edges."""
    cols: tuple[int, ...]
    """The columns of vertical edges."""
    across_cols: Doubles
    """(stretches between `rows`, W)."""
    across_rows: Doubles
    """(stretches between `cols`, H)."""


def profiles(source: BoxSource, rows: Sequence[int], cols: Sequence[int]) -> Profiles:
    """One pass over the picture. Lines lie inside it."""
    size = source.size
    row_bounds, col_bounds = np.unique([0, *rows, size.height]), np.unique([0, *cols, size.width])
    sums, per_row = np.zeros((len(row_bounds) - 1, size.width)), []
    for box, _ in band_boxes(size):
        light = luma(source.read(box)).astype(np.float64)
        per_row.append(np.add.reduceat(light, col_bounds[:-1], axis=1) / np.diff(col_bounds))
        for index, (top, bottom) in enumerate(itertools.pairwise(row_bounds)):
            sums[index] += light[max(0, top - box.top) : max(0, bottom - box.top)].sum(0)
    return Profiles(
        rows=tuple(rows),
        cols=tuple(cols),
        across_cols=sums / np.diff(row_bounds)[:, None],
        across_rows=np.ascontiguousarray(np.concatenate(per_row).T),
    )


def seams(edges: Profiles, seed: int = 0, fakes: int = 99, cell_px: int = 1) -> Seams:
    """How much the grid of the profiles is seen, against `fakes` grids of the same pitch at random offsets.

    The stretches stay those of the grid; only the lines move, all rows together and all columns together, wrapped, none within
    2 px of a true one. Without seams the true offset is one among equals, so the p-value is uniform. Without lines all is 1.
    cell_px: as `seam_score` has it.
    """
    if not edges.rows and not edges.cols:
        return Seams(score=1.0, visibility=1.0, median=1.0, p_value=1.0, fakes=0)
    lines, extents = (edges.rows, edges.cols), (edges.across_rows.shape[1], edges.across_cols.shape[1])
    own = _line_visibility(edges, edges.rows, edges.cols)
    rng = np.random.default_rng(seed)
    null = np.asarray(
        [
            _line_visibility(edges, *(_moved(part, extent, rng, cell_px) for part, extent in zip(lines, extents, strict=True)))
            for _ in range(fakes)
        ]
    )
    median = float(np.median(null))
    p_value = (1 + int((null >= own).sum())) / (1 + fakes)
    return Seams(score=own / median if median else 1.0, visibility=own, median=median, p_value=p_value, fakes=fakes)


def _line_visibility(edges: Profiles, rows: Sequence[int], cols: Sequence[int]) -> float:
    return _ratio(_coherent(steps_across(edges.across_cols), cols), _coherent(steps_across(edges.across_rows), rows))


def seam_visibility(picture: Floats, rows: Sequence[int], cols: Sequence[int]) -> float:
    """RMS of the coherent step across the given lines over that of all other lines; about 1 without seams, 3 at most.

    The step across a line is the gradient there less the mean of the gradients on either side of it, averaged along each
    edge of the grid (so a faint but steady offset adds up and texture cancels). Steps count in robust standard deviations
    of their strip of the picture and at most `CLIP_SIGMAS`: one ridge or shore that happens to lie on a line is not a seam.
    """
    return _ratio(_steps(picture, cols, rows), _steps(picture.T, rows, cols))


def lattice_score(picture: Floats, pitch: int) -> float:
    """How much a decoder's cells are seen; 1 means not at all.

    RMS of the steps across the lines at multiples of `pitch`, whole lines, over that of the others.
    """
    rows, cols = (tuple(range(pitch, extent - 2, pitch)) for extent in picture.shape)
    return _ratio(_steps(picture, cols, ()), _steps(picture.T, rows, ()))


def _ratio(*steps: tuple[Doubles, Doubles]) -> float:
    """RMS on the lines over RMS off them, of all directions together; 1 without lines and where nothing steps."""
    on, off = (np.concatenate(part) for part in zip(*steps, strict=True))
    if not on.size or not (on.any() or off.any()):
        return 1.0
    return float(np.sqrt(np.mean(on**2) / np.mean(off**2)))


def _steps(picture: Floats, cols: Sequence[int], rows: Sequence[int]) -> tuple[Doubles, Doubles]:
    """Coherent steps across vertical lines at `cols` and at all other columns, per segment between `rows`, in robust sigmas."""
    bounds = np.unique([0, *rows, picture.shape[0]])
    means = np.add.reduceat(picture, bounds[:-1], axis=0, dtype=np.float64) / np.diff(bounds)[:, None]
    return _coherent(steps_across(means), cols)


def steps_across(means: Doubles) -> Doubles:
    """The step across every line 2, 3, … of profiles (n, extent), as (n, extent - 3)."""
    gradient = np.diff(means, axis=1)  # gradient[:, c - 1] is across the line at column c
    step: Doubles = gradient[:, 1:-1] - (gradient[:, :-2] + gradient[:, 2:]) / 2  # step[:, c - 2] is at column c
    return step


def _coherent(steps: Doubles, lines: Sequence[int]) -> tuple[Doubles, Doubles]:
    """Steps (n, extent - 3) at the lines and at all others, in robust sigmas of their stretch, clipped."""
    mask = np.zeros(steps.shape[1], dtype=bool)
    mask[[line - 2 for line in lines if 2 <= line < steps.shape[1] + 2]] = True
    clipped = in_sigmas(steps, ~mask)
    return clipped[:, mask].ravel(), clipped[:, ~mask].ravel()


def in_sigmas(steps: Doubles, counted: NDArray[np.bool_]) -> Doubles:
    """Steps over their median magnitude where `counted`, as a standard deviation, clipped at `CLIP_SIGMAS`."""
    sigma = 1.4826 * np.median(np.abs(steps[:, counted]), axis=1, keepdims=True)
    clipped: Doubles = np.clip(steps / np.maximum(sigma, FLAT_STEP), -CLIP_SIGMAS, CLIP_SIGMAS)
    return clipped


def seam_score(
    picture: Floats, rows: Sequence[int], cols: Sequence[int], seed: int = 0, fakes: int = 50, cell_px: int = 1
) -> float:
    """Seam visibility at the true grid over its median at `fakes` random grids of the same pitch; 1 means no seam is seen.

    cell_px: random grids are moved by multiples of it. Tiles and bands lie on a decoder's cells: with the cells' side the score
    is of the tiles alone, what the cells show being in both (`lattice_score` has that). 1.0 where there are no lines.
    """
    if not rows and not cols:
        return 1.0
    rng = np.random.default_rng(seed)
    controls = [
        seam_visibility(picture, _moved(rows, picture.shape[0], rng, cell_px), _moved(cols, picture.shape[1], rng, cell_px))
        for _ in range(fakes)
    ]
    return seam_visibility(picture, rows, cols) / float(np.median(controls))


def _moved(lines: Sequence[int], extent: int, rng: np.random.Generator, cell_px: int = 1) -> tuple[int, ...]:
    """The same lines shifted together by a random number of cells, wrapped, none within 2 px of a true one."""
    if not lines:
        return ()
    true = np.asarray(lines)
    for _ in range(100):
        moved = (
            true + (rng.integers(3, extent - 3) if cell_px == 1 else cell_px * rng.integers(1, extent // cell_px))
        ) % extent
        moved = moved[(moved > 2) & (moved < extent - 2)]
        if len(moved) and np.abs(moved[:, None] - true[None, :]).min() > 2:
            break
    return tuple(sorted(int(line) for line in moved))


def seam_ratio(picture: Floats, rows: Sequence[int], cols: Sequence[int]) -> float:
    """Mean absolute gradient across the lines over that across all others; below 1 a blur, above an edge. 1.0 without lines.

    Lines within one cell of a seam count as neither; the mean of both directions.
    """
    ratios = [_axis_ratio(part, lines) for part, lines in ((picture, rows), (picture.T, cols)) if len(lines)]
    return float(np.mean(ratios)) if ratios else 1.0


def _axis_ratio(picture: Floats, lines: Sequence[int]) -> float:
    steps = np.abs(np.diff(picture.astype(np.float64), axis=0)).mean(1)  # steps[i - 1] is across the line at row i
    at = np.asarray(lines) - 1
    near = np.zeros(len(steps), dtype=bool)
    for offset in (-1, 0, 1):
        near[np.clip(at + offset, 0, len(steps) - 1)] = True
    return float(steps[at].mean() / steps[~near].mean())


def lattice_power(edges: Profiles, period_rows: float, period_cols: float) -> float | None:
    """Power of the step energy's spectrum at the multiples of 1 / period over that between them, in dB; 0 without a lattice.

    Step energy is the clipped square of each line's coherent step: tiles' offsets have either sign, and cancel in the
    spectrum of the picture itself; a blur that repeats with the tiles is seen as well. Hann-windowed, the discrete-time Fourier
    sum at the exact frequencies, mean over stretches, axes and at most `HARMONICS` multiples. None where fewer than four
    periods fit on either axis.
    """
    axes = ((edges.across_rows, period_rows), (edges.across_cols, period_cols))
    steps = [(steps_across(means), period) for means, period in axes if 4 * period <= means.shape[1] - 3]
    if not steps:
        return None
    energies = [(in_sigmas(part, np.ones(part.shape[1], dtype=bool)) ** 2, period) for part, period in steps]
    on, between = np.mean([_shares(*comb_power(energy, period)) for energy, period in energies], axis=0)
    return 10 * float(np.log10(on / between)) if on and between else 0.0


def _shares(on: float, between: float) -> tuple[float, float]:
    """Of their sum, so that an axis counts for how regular it is and not for how strong."""
    return (on / (on + between), between / (on + between)) if on + between else (0.0, 0.0)


def comb_power(energy: Doubles, period: float) -> tuple[float, float]:
    """Mean power of rows (n, extent) at the multiples of 1 / period and between them, beyond the main lobe of Hann's window.

    A comb of height h on white noise of variance v: their ratio is 1 + 2 extent h^2 / (3 v period^2).
    """
    count = energy.shape[1]
    window = np.hanning(count + 2)[1:-1]
    multiples = np.arange(1, max(1, min(HARMONICS, math.ceil(period / 2) - 1)) + 1)
    apart = np.linspace(min(0.5, 2 * period / count), min(0.5, 8 * period / count), 4)  # in periods
    level = (energy * window).sum(1, keepdims=True) / window.sum()

    def power(offsets: Doubles) -> float:
        frequencies = (multiples[:, None] + offsets).ravel() / period
        turns = np.exp(-2j * np.pi * frequencies[:, None] * np.arange(count))
        return float(np.mean(np.abs(((energy - level) * window) @ turns.T) ** 2))

    return power(np.zeros(1)), power(np.concatenate([-apart, apart]))
