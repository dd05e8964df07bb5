"""Linear low-pass filters of a canvas: area mean, wavelet, Fourier.

A filter maps (B, C, h, w) of any size to the same shape in float32. It is two small matrices per axis, down to the band's
coefficients and up again, so filtering the latents of an 8K picture takes four thin matrix products. Edges are mirrored or
repeated, never wrapped: the sky does not leak into the ground.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.errors import RequestError
from hires.tiling.resize import axis_taps

Matrix = NDArray[np.float64]
NEGLIGIBLE = 2.0**-24  # a response below half a unit in the last place of float32
INDEPENDENT = 1e-9  # singular values below are directions that the rows do not span


class SeparableFilter(Protocol):
    """A low-pass given by matrices per axis. Hashable, so that they are computed once per length and device."""

    def __hash__(self) -> int: ...

    def factors(self, extent: int) -> tuple[Matrix, Matrix]:
        """The matrices down (k, extent) and up (extent, k) of an axis."""
        ...

    def response(self, rows: int, cols: int) -> Matrix | None:
        """The factors (k_rows, k_cols) of the coefficients of a canvas; None if all are 1."""
        ...


@dataclass(frozen=True, slots=True)
class Area:
    """The mean over `factor` x `factor` cells, enlarged by bicubic: what a picture `factor` times smaller can hold.

    A side that `factor` does not divide is averaged over fractions of cells. Not idempotent: LP(LP(x)) is a little smoother
    than LP(x). RequestError for a factor below 1.
    """

    factor: float
    """How many times smaller the base picture is; may be a fraction."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise RequestError(f"low-pass factor {self.factor:g}: give how many times smaller the base is, 1 or more")

    def __call__(self, x: Tensor) -> Tensor:
        """The low band of x (B, C, h, w), float32."""
        return _filtered(self, x)

    def factors(self, extent: int) -> tuple[Matrix, Matrix]:
        """The matrices down (k, extent) and up (extent, k) of an axis."""
        few = max(1, round(extent / self.factor))
        _, _, up = axis_taps(few, extent, 0, extent)
        return area_axis(extent, few), up.numpy().astype(np.float64)

    def response(self, rows: int, cols: int) -> Matrix | None:
        """The factors (k_rows, k_cols) of the coefficients; None if all are 1."""
        return None


@dataclass(frozen=True, slots=True)
class Wavelet:
    """The coarsest band of Daubechies' wavelets.

    The orthogonal projection onto the span of the scaling functions, cut off at the edges: LP(LP(x)) = LP(x), and polynomials
    of a degree below `moments` pass unchanged up to the edge. RequestError for levels or moments outside 1 to 8.
    """

    levels: int
    """Steps of the transform; the band is 2^levels times smaller."""
    moments: int = 4
    """Vanishing moments: 1 is Haar, 4 is db4."""

    def __post_init__(self) -> None:
        if not (1 <= self.levels <= 8 and 1 <= self.moments <= 8):
            raise RequestError(f"wavelet of {self.levels} levels and {self.moments} moments: give 1 to 8 of each")

    def __call__(self, x: Tensor) -> Tensor:
        """The low band of x (B, C, h, w), float32."""
        return _filtered(self, x)

    def factors(self, extent: int) -> tuple[Matrix, Matrix]:
        """The matrices down (k, extent) and up (extent, k) of an axis."""
        basis = _orthonormal(_translates(daubechies(self.moments), self.levels, extent))
        return basis, basis.T

    def response(self, rows: int, cols: int) -> Matrix | None:
        """The factors (k_rows, k_cols) of the coefficients; None if all are 1."""
        return None


@dataclass(frozen=True, slots=True)
class Fourier:
    """The radial frequencies up to a cutoff, of the picture mirrored at its edges.

    RequestError for a cutoff outside (0, 1] or an order outside 1 to 16.
    """

    cutoff: float
    """In cycles per cell; 0.5 is the finest frequency of an axis."""
    order: int | None = None
    """Of Butterworth's response 1 / (1 + (f / cutoff)^(2 order)), half at the cutoff; None is ideal: LP(LP(x)) = LP(x)."""

    def __post_init__(self) -> None:
        if not 0 < self.cutoff <= 1 or (self.order is not None and not 1 <= self.order <= 16):
            raise RequestError(
                f"low-pass cutoff {self.cutoff:g}, order {self.order}: give cycles per cell in (0, 1], an order of 1 to 16"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """The low band of x (B, C, h, w), float32."""
        return _filtered(self, x)

    def factors(self, extent: int) -> tuple[Matrix, Matrix]:
        """The orthonormal rows of the DCT-II, as far up as the response reaches."""
        k = np.arange(extent)
        k = k[self._of(k / (2 * extent)) > NEGLIGIBLE]
        basis = np.cos(np.pi * k[:, None] * (np.arange(extent) + 0.5) / extent) * math.sqrt(2 / extent)
        basis[0] = math.sqrt(1 / extent)
        return basis, basis.T

    def response(self, rows: int, cols: int) -> Matrix | None:
        """The factors (k_rows, k_cols) of the coefficients; None if all are 1."""
        down_rows, down_cols = self.factors(rows)[0], self.factors(cols)[0]
        f_rows, f_cols = np.arange(len(down_rows)) / (2 * rows), np.arange(len(down_cols)) / (2 * cols)
        return self._of(np.hypot(f_rows[:, None], f_cols[None, :]))

    def _of(self, frequency: Matrix) -> Matrix:
        if self.order is None:
            return (frequency <= self.cutoff).astype(np.float64)
        return 1 / (1 + (frequency / self.cutoff) ** (2 * self.order))


def _filtered(low_pass: SeparableFilter, x: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    down_rows, up_rows = _on_device(low_pass, height, x.device)
    down_cols, up_cols = _on_device(low_pass, width, x.device)
    small = down_rows @ x.float() @ down_cols.T
    response = _response(low_pass, height, width, x.device)
    return up_rows @ (small if response is None else small * response) @ up_cols.T


@lru_cache(maxsize=16)
def _on_device(low_pass: SeparableFilter, extent: int, device: torch.device) -> tuple[Tensor, Tensor]:
    down, up = (torch.from_numpy(np.ascontiguousarray(part)).to(device, torch.float32) for part in low_pass.factors(extent))
    return down, up


@lru_cache(maxsize=8)
def _response(low_pass: SeparableFilter, height: int, width: int, device: torch.device) -> Tensor | None:
    response = low_pass.response(height, width)
    return None if response is None else torch.from_numpy(response).to(device, torch.float32)


def area_axis(source: int, target: int) -> Matrix:
    """Weights (target, source) of the mean over equal parts of an axis; a cell on a border counts by its share."""
    edges = np.arange(target + 1) * source / target
    cells = np.arange(source)
    covered = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    weights: Matrix = np.maximum(covered, 0.0)
    weights /= weights.sum(1, keepdims=True)
    return weights


@lru_cache(maxsize=8)
def daubechies(moments: int) -> tuple[float, ...]:
    """The orthonormal low-pass filter of 2 `moments` taps with extremal phase (Daubechies 1988).

    |H(w)|^2 = 2 cos^2p(w/2) P(sin^2(w/2)), P(y) = sum_k C(p-1+k, k) y^k; the filter takes the roots inside the unit circle.
    """
    coefficients = [math.comb(moments - 1 + k, k) for k in range(moments)]
    taps = np.ones(1, dtype=np.complex128)
    for y in np.roots(coefficients[::-1]):
        half = 1 - 2 * y  # y = (2 - z - 1/z) / 4, so z + 1/z = 2 half
        root = half + np.sqrt(half**2 - 1 + 0j)
        taps = np.convolve(taps, [1, -(root if abs(root) < 1 else 1 / root)])
    for _ in range(moments):
        taps = np.convolve(taps, [1, 1])
    return tuple(float(tap) for tap in taps.real * math.sqrt(2) / taps.real.sum())


def _translates(taps: tuple[float, ...], levels: int, extent: int) -> Matrix:
    """The translates by 2^levels of the scaling function that touch the axis, cut to it: (k, extent)."""
    scaling = np.ones(1)
    for level in range(levels):
        spread = np.zeros((len(taps) - 1) * 2**level + 1)
        spread[:: 2**level] = taps
        scaling = np.convolve(scaling, spread)
    pitch, reach = 2**levels, len(scaling)
    first = -((reach - 1) // pitch) * pitch
    rows = []
    for start in range(first, extent, pitch):
        row = np.zeros(extent)
        low, high = max(start, 0), min(start + reach, extent)
        row[low:high] = scaling[low - start : high - start]
        rows.append(row)
    return np.stack(rows)


def _orthonormal(rows: Matrix) -> Matrix:
    """An orthonormal basis (k, n) of the rows' span."""
    _, values, basis = np.linalg.svd(rows, full_matrices=False)
    independent: Matrix = basis[values > INDEPENDENT * values[0]]
    return independent
