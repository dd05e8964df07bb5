"""Noise of the canvas: a pure function of (seed, stage, step, part, cell)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.tiling.geometry import Box


class Noise(Protocol):
    """Unit Gaussian noise of the canvas for the steps of a sampler."""

    def __call__(self, step: int, part: int = 0) -> Tensor:
        """The noise of a step; `part` counts independent draws within it."""
        ...


class CanvasNoise:
    """Unit Gaussian noise that is a pure function of (seed, stage, step, part, channel, row, column).

    The value at a cell does not depend on the canvas size, tiles, batches, threads or the device: integers are hashed (the
    splitmix64 finaliser, Steele et al. 2014) and turned into normals by Box-Muller in float64 on the CPU.
    """

    def __init__(self, seed: int, stage: int, box: Box, channels: int, device: torch.device | str = "cpu") -> None:
        self.seed, self.stage, self.box, self.channels, self.device = seed, stage, box, channels, device

    def __call__(self, step: int, part: int = 0) -> Tensor:
        """The noise of a step, (1, C, h, w) float32; step -1 is the start."""
        values = canvas_noise(self.seed, self.stage, step, self.box, self.channels, part)
        return torch.from_numpy(values)[None].to(self.device)


class PicturesNoise:
    """The noise of several pictures in one batch, each its own as if it were alone."""

    def __init__(self, seeds: Sequence[int], alone: Callable[[int], CanvasNoise]) -> None:
        each = {seed: alone(seed) for seed in seeds}
        self.seeds, self.each, self.stage = tuple(seeds), each, each[seeds[0]].stage

    @property
    def seed(self) -> int:
        """The first picture's."""
        return self.seeds[0]

    def __call__(self, step: int, part: int = 0) -> Tensor:
        """The noise of a step, (B, C, h, w) float32; step -1 is the start."""
        drawn = {seed: noise(step, part) for seed, noise in self.each.items()}
        return torch.cat([drawn[seed] for seed in self.seeds])


def canvas_noise(seed: int, stage: int, step: int, box: Box, channels: int, part: int = 0) -> NDArray[np.float32]:
    """The noise of `CanvasNoise` for a box of the canvas, (channels, height, width) float32."""
    key = _mix(_mix(_mix(np.uint64(seed & (2**64 - 1))) ^ np.uint64(stage)) ^ np.uint64(step + 1))
    if part:  # part 0 must stay the noise of steps that draw only once
        key = _mix(key ^ np.uint64(part))
    rows = np.arange(box.top, box.bottom, dtype=np.uint64)[None, :, None]
    cols = np.arange(box.left, box.right, dtype=np.uint64)[None, None, :]
    planes = np.arange(channels, dtype=np.uint64)[:, None, None]
    bits = _mix(_mix((rows << np.uint64(32)) ^ cols ^ key) ^ (planes << np.uint64(56)))
    u1 = ((bits >> np.uint64(40)) + np.uint64(1)) * 2.0**-24  # (0, 1]
    u2 = (bits & np.uint64(0xFFFFFFFF)) * 2.0**-32
    normal: NDArray[np.float64] = np.sqrt(-2 * np.log(u1)) * np.cos(2 * np.pi * u2)
    return normal.astype(np.float32)


def _mix(z: Any) -> Any:
    """The splitmix64 finaliser on uint64 values; overflow wraps around on purpose."""
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNoise:
    """Which noise a sampler adds on the way, and how much; k-diffusion's names and defaults."""

    source: Noise
    """The unit noise of the canvas."""
    s_noise: float = 1.0
    """The standard deviation of the noise, relative to the sampler's formula."""
    eta: float | None = None
    """0 solves the ODE without noise, 1 the SDE; None takes the sampler's own: 0 for ddim and DPM-Solver, 0.3 for tcd (its
    gamma), 1 for the others.
    """
    table: Sequence[float] | None = None
    """The rising sigmas of the checkpoint's timesteps, which tcd counts; None for an EDM model."""
    s_churn: float = 0.0
    """How much noise euler, heun and dpm_2 add in all before their steps (Karras et al. 2022, algorithm 2); 0 adds none."""
    s_tmin: float = 0.0
    """The lowest sigma at which that noise is added."""
    s_tmax: float = math.inf
    """The highest sigma at which that noise is added."""

    def eta_or(self, default: float) -> float:
        """`eta`, or the sampler's own where it is unset."""
        return default if self.eta is None else self.eta

    def unit(self, x: Tensor, step: int, part: int = 0) -> Tensor:
        """Unit noise of a step with the dtype and device of x; `part` counts independent draws within it."""
        return drawn(self.source, x, step, part)

    def added(self, x: Tensor, step: int, std: float) -> Tensor:
        """X + std s_noise n with the step's unit noise n; x itself where std is 0."""
        return x + self.unit(x, step) * (std * self.s_noise) if std > 0 else x


def drawn(noise: Noise, x: Tensor, step: int, part: int = 0) -> Tensor:
    """Unit noise with the dtype and device of x."""
    value: Tensor = noise(step, part).to(x)
    return value


def joined(first: Tensor, second: Tensor, lengths: tuple[float, float]) -> Tensor:
    """N = (sqrt(a) n1 + sqrt(b) n2) / sqrt(a + b): the unit noise of an interval from that of its two parts.

    lengths: (a, b) of the parts, in sigma. The Brownian convention: a sampler that needs noise of a step and of a
    sub-interval draws one independent part per sub-interval, in the order of falling sigma, part 0 first. Increments add up,
    so all noise of the step belongs to one Brownian path W(sigma), as with k-diffusion's Brownian tree.
    """
    a, b = lengths
    return first * math.sqrt(a / (a + b)) + second * math.sqrt(b / (a + b))
