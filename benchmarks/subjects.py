"""The models that strategies are run on: the oracle, whose answer is known, and the shipped model of scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.oracle import Oracle
from hires.denoisers import Denoiser
from hires.kernels.policies import Attending, everywhere
from hires.schedules import karras
from hires.tiling.geometry import Box, Size
from hires.tiling.resize import Enlarged


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleSubject:
    """The oracle under Euler on Karras' levels, enlarged by bicubic in one leap.

    A relay begins at the first of its levels at or below `relay_sigma`; held to the picture before, at or below `held_sigma`.
    """

    oracle: Oracle = field(default_factory=Oracle)
    steps: int = 30
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    relay_sigma: float = 1.0
    held_sigma: float = 1.0
    channels: int = 1
    sampler: str = "euler"

    @property
    def native(self) -> int:
        return self.oracle.native

    @property
    def overlap(self) -> int:
        return self.native // 2

    def canvases(self, canvas: Size) -> Sequence[Size]:
        """The window, then the canvas; a canvas of another shape than the window's begins at its own shape."""
        least = min(canvas.height, canvas.width)
        first = Size(round(canvas.height * self.native / least), round(canvas.width * self.native / least))
        return (first, canvas)

    def sigmas(self, relay: str | None = None) -> Tensor:
        levels = karras(self.steps, self.sigma_min, self.sigma_max)
        if relay is None:
            return levels
        return levels[levels <= (self.held_sigma if relay == "held" else self.relay_sigma)]

    def network(self, policy: Attending = everywhere) -> Denoiser:
        return self.oracle

    def guided(self, on_canvas: Denoiser, canvas: Size, relay: bool) -> tuple[Denoiser, Any]:
        return on_canvas, None

    def enlarged(self, latents: Tensor, target: Size) -> Tensor:
        box = Box(0, 0, target.height, target.width)
        return Enlarged(latents, target, box).crop(box)

    def flops(self, height: int, width: int, policy: str) -> float:
        """Four real transforms of 2.5 N log2 N."""
        return 4 * 2.5 * height * width * math.log2(height * width)
