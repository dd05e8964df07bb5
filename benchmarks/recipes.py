"""Strategies side by side, each written out on the house's parts: what a canvas beyond a model's size can be drawn by.

A recipe is `recipe(subject, canvas, seed, work) -> (latents, grid)`; a subject is a model that can be run on tiles. The grid
says where tiles meet. Recipes that are published elsewhere are there to be measured against, not to be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hires.kernels.attention_policies import EVERYWHERE, NPA, Policy
from hires.protocols import Denoiser, LowPass
from hires.refine.low_pass import Fourier
from hires.refine.structure import Strength, structure_guided, variance_ramp
from hires.sampling.noise import CanvasNoise, StepNoise
from hires.sampling.samplers import find_sampler
from hires.tiling.denoise import Shift, seeded_shift, tiled
from hires.tiling.geometry import Box, Size, TileGrid, make_grid


class Subject(Protocol):
    """A model as a strategy sees it. Sizes in cells; `native` is the side it knows."""

    @property
    def native(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def overlap(self) -> int:
        """Cells that a relay's tiles share."""
        ...

    @property
    def sampler(self) -> str: ...

    def canvases(self, canvas: Size) -> Sequence[Size]:
        """What a relay goes through, the base picture first."""
        ...

    def sigmas(self, relay: bool) -> Tensor:
        """Noise levels from the start, or of a relay's stage."""
        ...

    def network(self, policy: Policy) -> Denoiser:
        """The model on one tile, its self-attention under a policy."""
        ...

    def guided(self, on_canvas: Denoiser, canvas: Size, relay: bool) -> tuple[Denoiser, Any]:
        """The canvas's denoiser under the model's guidance, and what it is conditioned on."""
        ...

    def enlarged(self, latents: Tensor, target: Size) -> Tensor:
        """Latents of a stage at the next one's size."""
        ...

    def flops(self, height: int, width: int, policy: Policy) -> float:
        """Of one estimate of one tile."""
        ...


@dataclass(slots=True)
class Work:
    """What a run cost: estimates counted in native windows, and FLOPs of the network."""

    windows: float = 0.0
    flops: float = 0.0

    def counted(self, subject: Subject, policy: Policy = EVERYWHERE) -> Denoiser:
        """The model on one tile, counted."""
        network = subject.network(policy)

        def denoise(x: Tensor, sigma: float, cond: Any) -> Tensor:
            count, _, height, width = x.shape
            self.windows += count * height * width / subject.native**2
            self.flops += count * subject.flops(height, width, policy)
            return network(x, sigma, cond)

        return denoise


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A stage before its first step: where it starts from, its canvas noise and its levels."""

    x: Tensor
    noise: CanvasNoise
    sigmas: Tensor

    @classmethod
    def of(cls, subject: Subject, canvas: Size, seed: int, stage: int, before: Tensor | None = None) -> Start:
        """From noise alone, or from the picture before, enlarged, and the relay's noise."""
        noise = CanvasNoise(seed, stage, Box(0, 0, canvas.height, canvas.width), subject.channels)
        sigmas = subject.sigmas(before is not None)
        first = float(sigmas[0])
        x = noise(-1) * math.sqrt(first**2 + 1) if before is None else before + noise(-1) * first
        return cls(x=x, noise=noise, sigmas=sigmas)

    def sampled(self, subject: Subject, denoise: Denoiser, cond: Any) -> Tensor:
        return find_sampler(subject.sampler)(denoise, self.x, self.sigmas, cond, StepNoise(source=self.noise))


Made = tuple[Tensor, TileGrid]
Recipe = Callable[[Subject, Size, int, Work], Made]
BATCH = 4  # tiles at once


def reference_grid(subject: Subject, canvas: Size) -> TileGrid:
    """Tiles of the native size that share half: MultiDiffusion's, and where seams are sought of strategies without tiles."""
    return make_grid(canvas, Size(subject.native, subject.native), subject.native // 2)


def base(subject: Subject, canvas: Size, seed: int, work: Work) -> Made:
    """The first picture of every relay, at the size that the model knows."""
    size = subject.canvases(canvas)[0]
    denoise, cond = subject.guided(work.counted(subject), size, relay=False)
    return Start.of(subject, size, seed, 0).sampled(subject, denoise, cond), make_grid(size, size, 0)


def direct(subject: Subject, canvas: Size, seed: int, work: Work) -> Made:
    """The whole canvas from noise in one piece."""
    denoise, cond = subject.guided(work.counted(subject), canvas, relay=False)
    return Start.of(subject, canvas, seed, 0).sampled(subject, denoise, cond), reference_grid(subject, canvas)


def multidiffusion(kind: str) -> Recipe:
    """Windows that share half, from noise, averaged with box (2302.08113) or hann weights at every step."""

    def recipe(subject: Subject, canvas: Size, seed: int, work: Work) -> Made:
        grid = reference_grid(subject, canvas)
        on_canvas = tiled(work.counted(subject), grid, batch=BATCH, kind=kind)
        denoise, cond = subject.guided(on_canvas, canvas, relay=False)
        return Start.of(subject, canvas, seed, 0).sampled(subject, denoise, cond), grid

    return recipe


def spot(subject: Subject, canvas: Size, seed: int, work: Work) -> Made:
    """SpotDiffusion (2407.15507): windows that share nothing on a canvas rolled anew at every step."""
    grid = make_grid(canvas, Size(subject.native, subject.native), 0)
    on_canvas = rolled(tiled(work.counted(subject), grid, batch=BATCH, kind="box"), random_roll(seed, canvas))
    denoise, cond = subject.guided(on_canvas, canvas, relay=False)
    return Start.of(subject, canvas, seed, 0).sampled(subject, denoise, cond), reference_grid(subject, canvas)


def rolled(denoise: Denoiser, roll: Shift) -> Denoiser:
    """The estimate of the canvas rolled by roll(sigma) cells, rolled back. Conditions of a place do not roll with it."""

    def estimate(x: Tensor, sigma: float, cond: Any) -> Tensor:
        rows, cols = roll(sigma)
        return denoise(x.roll((rows, cols), (-2, -1)), sigma, cond).roll((-rows, -cols), (-2, -1))

    return estimate


def random_roll(seed: int, canvas: Size) -> Shift:
    """A roll per noise level, even over the canvas."""

    def roll(sigma: float) -> tuple[int, int]:
        rng = np.random.default_rng([seed, int(np.float64(sigma).view(np.uint64))])
        return int(rng.integers(canvas.height)), int(rng.integers(canvas.width))

    return roll


@dataclass(frozen=True, slots=True)
class Hold:
    """How a relay is held to the picture before: the low-pass of a canvas `factor` times the base, a ramp from its sigma."""

    low_pass: Callable[[float], LowPass]
    ramp: Callable[[float], Strength]


HOLD = Hold(lambda factor: Fourier(0.5 / factor), variance_ramp)
"""All that the base picture can hold, up to its Nyquist frequency, and ScaleDiff's ramp. By `python -m benchmarks guides` an
ideal low-pass leaves no trace at tile edges and keeps more new detail at the same drift than area means or wavelets."""


def relay(*, hold: Hold | None = None, npa: bool = False) -> Recipe:
    """Base picture, enlarge, re-noise, refine in tiles, as `hires` does.

    hold: under structure guidance. npa: not in tiles but in one piece, self-attention in neighbourhoods of the native size
    (ScaleDiff, 2510.25818).
    """

    def recipe(subject: Subject, canvas: Size, seed: int, work: Work) -> Made:
        latents, grid = base(subject, canvas, seed, work)
        first = subject.canvases(canvas)[0]
        for stage, size in enumerate(subject.canvases(canvas)[1:], start=1):
            before = subject.enlarged(latents, size)
            start = Start.of(subject, size, seed, stage, before)
            grid = make_grid(size, Size(subject.native, subject.native), subject.overlap)
            denoise, cond = subject.guided(refiner(subject, grid, work, npa), size, relay=True)
            if hold is not None:
                low_pass = hold.low_pass(math.sqrt(size.area / first.area))
                denoise = structure_guided(denoise, before, hold.ramp(float(start.sigmas[0])), low_pass)
            latents = start.sampled(subject, denoise, cond)
        return latents, reference_grid(subject, canvas) if npa else grid

    return recipe


def refiner(subject: Subject, grid: TileGrid, work: Work, npa: bool) -> Denoiser:
    """The canvas's denoiser in tiles, or whole with attention in neighbourhoods."""
    if npa:
        return work.counted(subject, NPA(subject.native))
    return tiled(work.counted(subject), grid, batch=BATCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoFusion:
    """The recipe of DemoFusion (2311.16973) with its default numbers: stages of 2, 3, ... times the native side, from noise.

    At step i of n, c = (1 + cos(pi i / n)) / 2: x is drawn back to the noised picture of the stage before by c^3; the estimate
    is (1 - c) of windows that share half, moved at random, and c of the s^2 dilated pictures of x blurred by c. Here both
    estimates are fused on the canvas and one Euler step taken from x, whatever the subject's sampler; c follows steps, not
    timesteps.
    """

    back: float = 3.0
    blur: float = 1.0

    def __call__(self, subject: Subject, canvas: Size, seed: int, work: Work) -> Made:
        latents, grid = base(subject, canvas, seed, work)
        anchor, first = latents, subject.canvases(canvas)[0]
        for scale in range(2, canvas.height // first.height + 1):
            size = first.times(scale)
            grid = reference_grid(subject, size)
            latents = self.stage(subject, subject.enlarged(latents, size), grid, (seed, scale), work)
            latents = (latents - latents.mean()) / latents.std() * anchor.std() + anchor.mean()
        return latents, grid

    def stage(self, subject: Subject, before: Tensor, grid: TileGrid, key: tuple[int, int], work: Work) -> Tensor:
        """One stage from the enlarged picture before it."""
        seed, scale = key
        start = Start.of(subject, grid.canvas, seed, scale)
        unit, steps = start.noise(-1), len(start.sigmas) - 1
        jitter = seeded_shift(seed, scale, subject.native // 8)
        windows, cond = subject.guided(
            tiled(work.counted(subject), grid, batch=BATCH, kind="box", shift=jitter), grid.canvas, relay=False
        )
        whole, _ = subject.guided(dilated(work.counted(subject), scale), grid.canvas, relay=False)
        x = before + unit * start.sigmas[0]
        for i in range(steps):
            sigma, following = float(start.sigmas[i]), float(start.sigmas[i + 1])
            c = (1 + math.cos(math.pi * i / steps)) / 2
            x = torch.lerp(x, before + unit * sigma, c**self.back)
            blurred = gaussian(x, scale, self.blur * (0.99 * c + 0.01))
            blurred = (blurred - blurred.mean()) / blurred.std() * x.std() + x.mean()
            estimate = torch.lerp(windows(x, sigma, cond), whole(blurred, sigma, cond), c)
            x = x + (x - estimate) * ((following - sigma) / sigma)
        return x


def dilated(denoise: Denoiser, scale: int) -> Denoiser:
    """The estimate made of `scale`^2 pictures of every `scale`-th row and column."""

    def estimate(x: Tensor, sigma: float, cond: Any) -> Tensor:
        result = torch.empty_like(x)
        for row in range(scale):
            for col in range(scale):
                result[..., row::scale, col::scale] = denoise(x[..., row::scale, col::scale], sigma, cond)
        return result

    return estimate


def gaussian(x: Tensor, scale: int, std: float) -> Tensor:
    """A blur of 2 scale - 1 taps a side, edges repeated."""
    i = torch.arange(-(scale - 1), scale, dtype=x.dtype)
    taps = torch.exp(-(i**2) / (2 * std**2))
    kernel = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)
    padded = F.pad(x, (scale - 1,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=x.shape[1]), kernel.mT, groups=x.shape[1])


RECIPES: dict[str, Recipe] = {
    "base": base,
    "direct": direct,
    "multidiffusion box": multidiffusion("box"),
    "multidiffusion hann": multidiffusion("hann"),
    "spot": spot,
    "demofusion": DemoFusion(),
    "relay": relay(),
    "relay + guidance": relay(hold=HOLD),
    "npa": relay(npa=True),
    "npa + guidance": relay(hold=HOLD, npa=True),
}
ATTENTION = ("npa", "npa + guidance")  # need a network that has attention
