"""The models that strategies are run on: the oracle, whose answer is known, and the shipped model of scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo.scenes import Scene
from benchmarks.oracle import Oracle
from hires.checkpoints.spec import load_spec
from hires.devices import machines
from hires.kernels.attention_policies import Policy
from hires.options.render import RenderRequest
from hires.pipelines.base import Runtime
from hires.pipelines.load import load_session
from hires.pipelines.progressive import stage_sigmas
from hires.planning import planner
from hires.planning.costs import flops as cost
from hires.planning.plan import StagePlan
from hires.protocols import Denoiser
from hires.refine.enlargers import ENLARGERS, Target
from hires.sampling.samplers import karras
from hires.tiling.geometry import Box, Size
from hires.tiling.resize import Enlarged


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleSubject:
    """The oracle under Euler on Karras' levels, its picture enlarged by bicubic in one leap.

    A relay begins at the first of the levels at or below `relay_sigma`.
    """

    oracle: Oracle = field(default_factory=Oracle)
    steps: int = 30
    sigma_min: float = 0.02
    sigma_max: float = 20.0
    relay_sigma: float = 1.0
    channels: int = 1
    sampler: str = "euler"

    @property
    def native(self) -> int:
        return self.oracle.native

    @property
    def overlap(self) -> int:
        return self.native // 2

    def canvases(self, canvas: Size) -> Sequence[Size]:
        """The picture of the canvas's shape that is a window high or wide, then the canvas."""
        least = min(canvas.height, canvas.width)
        first = Size(round(canvas.height * self.native / least), round(canvas.width * self.native / least))
        return (first, canvas)

    def sigmas(self, relay: bool) -> Tensor:
        levels = karras(self.steps, self.sigma_min, self.sigma_max)
        return levels[levels <= self.relay_sigma] if relay else levels

    def network(self, policy: Policy) -> Denoiser:
        return self.oracle

    def guided(self, on_canvas: Denoiser, canvas: Size, relay: bool) -> tuple[Denoiser, Any]:
        return on_canvas, None

    def enlarged(self, latents: Tensor, target: Size) -> Tensor:
        box = Box(0, 0, target.height, target.width)
        return Enlarged(latents, target, box).crop(box)

    def flops(self, height: int, width: int, policy: Policy) -> float:
        """Four real transforms of 2.5 N log2 N."""
        return 4 * 2.5 * height * width * math.log2(height * width)


class SceneSubject:
    """The shipped model on one held-out caption, as the progressive plan of a canvas in pixels would run it."""

    def __init__(self, scene: Scene, canvas: Size, relay_sigma: float | None = None) -> None:
        self.spec = load_spec("demo")
        request = RenderRequest(prompt=scene.caption, size=canvas, seed=scene.seed, strategy="progressive")
        device = machines.host_device()
        made = planner.plan(request, self.spec, device)
        self.family = load_session(request, made, self.spec, Runtime.of(request, made, torch.device("cpu")))
        sigma = made.stages[-1].sigma_start if relay_sigma is None else relay_sigma
        self.stages = tuple(replace(stage, sigma_start=sigma) if i else stage for i, stage in enumerate(made.stages))
        self.native, self.channels = self.spec.native_px // self.spec.cell_px, self.spec.facts.latent_channels
        self.relay_sigma, self.sampler = sigma, self.stages[0].sampler
        self.overlap = self.spec.defaults.overlap_px // self.spec.cell_px

    def canvases(self, canvas: Size) -> Sequence[Size]:
        return [stage.grid.canvas for stage in self.stages]

    def sigmas(self, relay: bool) -> Tensor:
        return stage_sigmas(self.spec, self.stages[-1 if relay else 0])

    def network(self, policy: Policy) -> Denoiser:
        return self.family.denoiser(lambda time: policy)

    def guided(self, on_canvas: Denoiser, canvas: Size, relay: bool) -> tuple[Denoiser, Any]:
        stage: StagePlan = replace(self.stages[-1 if relay else 0], canvas=canvas.times(self.spec.cell_px))
        return self.family.guided(on_canvas, stage)

    def enlarged(self, latents: Tensor, target: Size) -> Tensor:
        quiet = lambda done, total: None  # noqa: E731
        goal = Target(canvas=target.times(self.spec.cell_px), cells=target, decoding=quiet, encoding=quiet)
        return ENLARGERS[self.spec.defaults.enlarger[-1]](self.family, latents, goal).float()

    def flops(self, height: int, width: int, policy: Policy) -> float:
        return cost.network_flops(self.spec.network, height, width, self.spec.facts.tokens, policy)

    def picture(self, latents: Tensor) -> Tensor:
        """Pixels (3, H, W) in about [-1, 1]."""
        return torch.cat(list(self.family.decode_bands(latents, lambda done, total: None)), dim=-2)[0]
