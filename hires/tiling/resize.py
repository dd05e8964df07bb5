"""Enlarges a picture box by box, without holding the whole result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.tiling.geometry import Box, Size

Floats = NDArray[np.float64]
CUBIC = -0.5  # the third-order accurate member of the family (Keys 1981)


def _cubic(t: Floats) -> Floats:
    """Keys' cubic convolution kernel, (a+2)|t|^3 - (a+3)|t|^2 + 1 within 1, a(|t|^3 - 5|t|^2 + 8|t| - 4) within 2."""
    t = np.abs(t)
    near = (CUBIC + 2) * t**3 - (CUBIC + 3) * t**2 + 1
    far = CUBIC * (t**3 - 5 * t**2 + 8 * t - 4)
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _lanczos(t: Floats) -> Floats:
    """sinc(t) sinc(t / 3) within 3 (Duchon 1979): sharper than the cubic, rings a little."""
    return np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0.0)


KERNELS: dict[str, tuple[int, Callable[[Floats], Floats]]] = {"bicubic": (2, _cubic), "lanczos": (3, _lanczos)}


def axis_taps(source: int, target: int, start: int, stop: int, kernel: str = "bicubic") -> tuple[int, int, Tensor]:
    """The source range [low, high) that target positions [start, stop) read, and the weights (stop - start, high - low).

    For enlarging. Pixel centres align: position i reads around (i + 1/2) source / target - 1/2. Edges are repeated; weights
    sum to one.
    """
    reach, weight = KERNELS[kernel]
    centres = (np.arange(start, stop) + 0.5) * source / target - 0.5
    first = np.floor(centres).astype(np.int64) - reach + 1
    low, high = max(0, int(first.min())), min(source, int(first.max()) + 2 * reach)
    taps = np.stack([weight(centres - (first + k)) for k in range(2 * reach)])
    if kernel != "bicubic":  # Keys' kernel already sums to one; dividing would change its last bit
        taps = taps / taps.sum(0)
    weights = np.zeros((stop - start, high - low), dtype=np.float64)
    rows = np.arange(stop - start)
    for k in range(2 * reach):
        np.add.at(weights, (rows, np.clip(first + k, low, high - 1) - low), taps[k])
    return low, high, torch.from_numpy(weights.astype(np.float32))


@dataclass(frozen=True, slots=True)
class Enlarged:
    """An enlarged and cropped picture whose pixels are computed on demand."""

    source: Tensor
    """The picture, (B, C, h, w)."""
    resized: Size
    """The size to enlarge to."""
    box: Box
    """The part of the enlarged picture to show."""
    kernel: str = "bicubic"
    """One of `KERNELS`."""

    @property
    def size(self) -> Size:
        """The size of the crop."""
        return Size(self.box.height, self.box.width)

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, C, part.height, part.width) float32; `part` is relative to the crop."""
        top, left = self.box.top + part.top, self.box.left + part.left
        height, width = self.source.shape[-2:]
        r0, r1, rows = axis_taps(height, self.resized.height, top, top + part.height, self.kernel)
        c0, c1, cols = axis_taps(width, self.resized.width, left, left + part.width, self.kernel)
        return rows @ self.source[..., r0:r1, c0:c1].float() @ cols.T


@dataclass(frozen=True, slots=True)
class Padded:
    """A picture padded to a size by repeating its last row and column; values in [-1, 1]."""

    pixels: NDArray[np.uint8]
    """The picture, (h, w, 3)."""
    size: Size
    """The padded size."""

    def crop(self, part: Box) -> Tensor:
        """Pixels (1, 3, part.height, part.width) float32."""
        rows = np.minimum(np.arange(part.top, part.top + part.height), self.pixels.shape[0] - 1)
        cols = np.minimum(np.arange(part.left, part.left + part.width), self.pixels.shape[1] - 1)
        part_pixels = torch.from_numpy(self.pixels[rows][:, cols])
        return part_pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
