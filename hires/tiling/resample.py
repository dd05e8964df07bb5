"""Resizes a picture by Lanczos, row by row from top to bottom, in little memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hires.tiling.geometry import Size

REACH = 3  # of the Lanczos kernel, in pixels of the coarser picture
COLUMNS = 256  # of the result at a time: a dense product over so many is faster than gathering taps


class RowSource(Protocol):
    """A picture whose rows are read from top to bottom."""

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        ...

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows (C, bottom - top, W) float32; `top` is never above that of an earlier call."""
        ...


@dataclass(frozen=True, slots=True)
class WholeRows:
    """A picture (C, H, W) in memory."""

    pixels: Tensor

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return Size(*self.pixels.shape[-2:])

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows (C, bottom - top, W)."""
        return self.pixels[:, top:bottom]


def lanczos_taps(source: int, target: int, start: int, stop: int) -> tuple[int, int, Tensor]:
    """The source range [low, high) that target positions [start, stop) read, and the weights (stop - start, high - low).

    sinc(t) sinc(t / 3) for |t| < 3, t in pixels of the coarser picture. Pixel centres align; taps outside the picture are
    dropped and the rest normalised to sum to one, as Pillow does. Weights are float32.
    """
    scale = source / target
    wide = max(1.0, scale)
    centres = (np.arange(start, stop) + 0.5) * scale
    low = max(0, int(np.floor(centres[0] - REACH * wide + 0.5)))
    high = min(source, int(np.floor(centres[-1] + REACH * wide + 0.5)))
    t = (np.arange(low, high)[None, :] + 0.5 - centres[:, None]) / wide
    weights = np.where(np.abs(t) < REACH, np.sinc(t) * np.sinc(t / REACH), 0.0)
    weights /= weights.sum(1, keepdims=True)
    return low, high, torch.from_numpy(weights.astype(np.float32))


class Resampled:
    """A picture's rows at another size, by Lanczos. An axis that keeps its length is not filtered."""

    def __init__(self, source: RowSource, size: Size) -> None:
        self.source, self.size = source, size
        across = source.size.width
        self._columns = [
            lanczos_taps(across, size.width, left, min(left + COLUMNS, size.width)) for left in range(0, size.width, COLUMNS)
        ]

    def rows(self, top: int, bottom: int) -> Tensor:
        """Rows (C, bottom - top, W) of the resized picture."""
        down = self.source.size.height
        if down == self.size.height:
            rows = self.source.rows(top, bottom)
        else:
            low, high, weights = lanczos_taps(down, self.size.height, top, bottom)
            rows = weights @ self.source.rows(low, high)
        if self.source.size.width == self.size.width:
            return rows
        return torch.cat([rows[..., low:high] @ weights.T for low, high, weights in self._columns], dim=-1)
