"""Stages: a base picture from noise, then enlarge, re-noise to sigma_s, refine in tiles, until the canvas is reached.

`direct` and `tiled` are plans with one stage; the code is the same. The relay keeps one subject where tiles from noise
would each draw their own (SDEdit, Meng et al. 2022; MegaFusion, ScaleDiff).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hires.catalogue import SAMPLERS, SCHEDULES, evaluations
from hires.denoisers import guided
from hires.device import peak_device_bytes, reset_peak
from hires.pipelines.base import Family
from hires.resolution import relay_view
from hires.samplers import CanvasNoise, find_sampler
from hires.schedules import make_sigmas
from hires.specs import ModelSpec, vp_sigmas
from hires.tiling.denoise import seeded_shift, tiled
from hires.tiling.geometry import Box, Size
from hires.tiling.resize import Enlarged
from hires.tiling.retry import Batcher
from hires.types import Event, MemoryPlan, OnEvent, StagePlan, StageStats

log = logging.getLogger(__name__)


@dataclass
class Denoised:
    """Final latents (1, C, h, w) float32 on the CPU and what each stage took."""

    latents: Tensor
    stats: list[StageStats] = field(default_factory=list)


def run(family: Family, plan: MemoryPlan, seed: int, on_event: OnEvent) -> Denoised:
    """Carry a plan's stages out. `on_event` hears of every tile batch and may raise to cancel."""
    result = Denoised(latents=torch.empty(0))
    batcher = Batcher(plan.batch)
    for index, stage in enumerate(plan.stages):
        begun, retries = time.monotonic(), batcher.retries + family.vae.retries
        recomputed = family.vae.recomputed
        reset_peak(family.device)
        cells = stage.grid.canvas
        noise = CanvasNoise(seed, index, Box(0, 0, cells.height, cells.width), family.spec.unet.latent_channels, family.device)
        start = sigma_start(family.spec, stage)
        if index == 0:
            x = noise(-1) * (start**2 + 1) ** 0.5
        else:
            enlarged = ENLARGERS[stage.enlarger or "pixel"](family, result.latents, stage, on_event)
            x = enlarged.to(family.device) + noise(-1) * start
        progress = TileProgress(stage, on_event)
        result.latents = denoise_stage(family, stage, x, noise, batcher, progress).float().cpu()
        progress.finish()
        result.stats.append(
            StageStats(
                stage=stage.name,
                seconds=round(time.monotonic() - begun, 3),
                peak_bytes=peak_device_bytes(family.device),
                tiles=progress.done,
                retries=batcher.retries + family.vae.retries - retries,
                recomputed=family.vae.recomputed - recomputed,
            )
        )
        log.info("stage %s took %.1f s", stage.name, result.stats[-1].seconds)
    return result


def stage_sigmas(spec: ModelSpec, stage: StagePlan) -> Tensor:
    """The noise levels of a stage, (steps + 1,)."""
    return make_sigmas(
        stage.schedule,
        stage.steps,
        sigma_min=spec.sigma_min,
        sigma_max=spec.sigma_max,
        table=None if spec.vp_betas is None else vp_sigmas(*spec.vp_betas),
        start=stage.sigma_start,
        discard_penultimate=SAMPLERS[stage.sampler].discard_penultimate,
    )


def sigma_start(spec: ModelSpec, stage: StagePlan) -> float:
    """The noise to begin with: the plan's, or the first level of a schedule on timesteps, which may lie below it."""
    return float(stage_sigmas(spec, stage)[0]) if SCHEDULES[stage.schedule].table else stage.sigma_start


def denoise_stage(
    family: Family, stage: StagePlan, x: Tensor, noise: CanvasNoise, batcher: Batcher, progress: TileProgress
) -> Tensor:
    """Sample one stage from x at its starting sigma down to 0: sampler(guided(tiled(precondition(network))))."""
    sigmas = stage_sigmas(family.spec, stage)
    conditional, unconditional = family.conditions(stage.canvas)
    shift = seeded_shift(noise.seed, noise.stage, stage.shift_cells) if stage.shift_cells else None
    on_canvas = tiled(family.denoiser(), stage.grid, batch=batcher, shift=shift, on_tiles=progress.advance)
    denoise = guided(on_canvas, unconditional, stage.guidance)
    with torch.inference_mode():
        return find_sampler(stage.sampler)(denoise, x, sigmas, conditional, noise, progress.step)


class TileProgress:
    """Turns tile batches and sampler steps into events."""

    def __init__(self, stage: StagePlan, on_event: OnEvent) -> None:
        self.stage, self.on_event = stage, on_event
        self.done, self.total, self.steps_done = 0, evaluations(stage.sampler, stage.steps) * stage.grid.count, 0
        self._tell()

    def advance(self, tiles: int) -> None:
        self.done += tiles
        self.total = max(self.total, self.done)
        self._tell()

    def step(self, index: int, denoised: Tensor) -> None:
        self.steps_done = min(index + 1, self.stage.steps)
        self._tell()

    def finish(self) -> None:
        """Where the sampler's evaluations were an estimate, the count it came to."""
        if not SAMPLERS[self.stage.sampler].known:
            self.total, self.steps_done = self.done, self.stage.steps
            self._tell()

    def _tell(self) -> None:
        stage = self.stage
        self.on_event(Event(stage=stage.name, done=self.done, total=self.total, step=self.steps_done, steps=stage.steps))


def enlarge_latents(family: Family, latents: Tensor, stage: StagePlan, on_event: OnEvent) -> Tensor:
    """Bicubic on the latents: no decoding, softer edges."""
    target = stage.grid.canvas
    view = Enlarged(latents, *relay_view(Size(latents.shape[-2], latents.shape[-1]), target))
    return view.crop(Box(0, 0, target.height, target.width))


def enlarge_pixels(family: Family, latents: Tensor, stage: StagePlan, on_event: OnEvent) -> Tensor:
    """Decode, then encode the picture enlarged by bicubic, band by band; the enlarged picture is never held whole."""

    def tell(name: str) -> Callable[[int, int], None]:
        return lambda done, total: on_event(Event(stage=f"{name} for {stage.name}", done=done, total=total))

    with torch.inference_mode():
        picture = torch.cat(list(family.decode_bands(latents, tell("decode"))), dim=-2)
        view = Enlarged(picture, *relay_view(Size(picture.shape[-2], picture.shape[-1]), stage.canvas))
        return family.encode(view, tell("encode"))


Enlarger = Callable[[Family, Tensor, StagePlan, OnEvent], Tensor]
ENLARGERS: dict[str, Enlarger] = {"pixel": enlarge_pixels, "latent": enlarge_latents}
