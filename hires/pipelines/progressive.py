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
from torch.nn import functional as F

from hires.denoisers import guided
from hires.device import peak_device_bytes, reset_peak
from hires.errors import RequestError, unknown
from hires.pipelines.base import Family
from hires.resolution import cover
from hires.samplers import EVALUATIONS, CanvasNoise, find_sampler
from hires.schedules import find_schedule
from hires.tiling.denoise import tiled
from hires.tiling.geometry import Box, Size
from hires.tiling.retry import Batcher
from hires.tiling.vae import decode_bands, encode_tiles
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
        begun, retries = time.monotonic(), batcher.retries
        reset_peak(family.device)
        cells = stage.grid.canvas
        noise = CanvasNoise(seed, index, Box(0, 0, cells.height, cells.width), family.spec.unet.latent_channels, family.device)
        if index == 0:
            x = noise(-1) * (stage.sigma_start**2 + 1) ** 0.5
        else:
            enlarged = enlarge(family, result.latents, stage, plan, on_event)
            x = enlarged.to(family.device) + noise(-1) * stage.sigma_start
        progress = TileProgress(stage, on_event)
        latents = denoise_stage(family, stage, x, noise, batcher, progress)
        result.latents = latents.float().cpu()
        result.stats.append(
            StageStats(
                stage=stage.name,
                seconds=round(time.monotonic() - begun, 3),
                peak_bytes=peak_device_bytes(family.device),
                tiles=progress.done,
                retries=batcher.retries - retries,
            )
        )
        log.info("stage %s took %.1f s", stage.name, result.stats[-1].seconds)
    return result


def denoise_stage(
    family: Family, stage: StagePlan, x: Tensor, noise: CanvasNoise, batcher: Batcher, progress: TileProgress
) -> Tensor:
    """Sample one stage from x at its starting sigma down to 0: sampler(guided(tiled(precondition(network))))."""
    sigmas = find_schedule(family.spec.defaults.schedule)(stage.steps, family.spec.sigma_min, stage.sigma_start)
    conditional, unconditional = family.conditions(stage.canvas)
    on_canvas = tiled(family.denoiser(), stage.grid, batch=batcher, on_tiles=progress.advance)
    denoise = guided(on_canvas, unconditional, stage.guidance)
    with torch.inference_mode():
        return find_sampler(stage.sampler)(denoise, x, sigmas, conditional, noise, progress.step)


class TileProgress:
    """Turns tile batches and sampler steps into events."""

    def __init__(self, stage: StagePlan, on_event: OnEvent) -> None:
        self.stage, self.on_event = stage, on_event
        evaluations = stage.steps * EVALUATIONS.get(stage.sampler, 1) - (EVALUATIONS.get(stage.sampler, 1) - 1)
        self.done, self.total, self.steps_done = 0, evaluations * stage.grid.count, 0
        self._tell()

    def advance(self, tiles: int) -> None:
        self.done += tiles
        self._tell()

    def step(self, index: int, denoised: Tensor) -> None:
        self.steps_done = index + 1
        self._tell()

    def _tell(self) -> None:
        stage = self.stage
        self.on_event(Event(stage=stage.name, done=self.done, total=self.total, step=self.steps_done, steps=stage.steps))


def enlarge(family: Family, latents: Tensor, stage: StagePlan, plan: MemoryPlan, on_event: OnEvent) -> Tensor:
    """The picture of the stage before at the size of this one, as latents (1, C, h, w) float32 on the CPU."""
    known: dict[str, Callable[..., Tensor]] = {"pixel": _enlarge_pixels, "latent": _enlarge_latents}
    name = stage.enlarger or "pixel"
    if name not in known:
        raise RequestError(unknown("enlarger", name, known))
    return known[name](family, latents, stage, plan, on_event)


def _enlarge_latents(family: Family, latents: Tensor, stage: StagePlan, plan: MemoryPlan, on_event: OnEvent) -> Tensor:
    return _resize(latents, stage.grid.canvas)


def _enlarge_pixels(family: Family, latents: Tensor, stage: StagePlan, plan: MemoryPlan, on_event: OnEvent) -> Tensor:
    """Decode, bicubic resize, encode."""

    def tell(name: str) -> Callable[[int, int], None]:
        return lambda done, total: on_event(Event(stage=f"{name} for {stage.name}", done=done, total=total))

    with torch.inference_mode():
        bands = decode_bands(family.decode, latents, plan.decode, family.spec.cell_px, tell("decode"))
        picture = _resize(torch.cat(list(bands), dim=-2), stage.canvas)
        return encode_tiles(family.encode, picture, plan.decode, family.spec.cell_px, tell("encode"))


def _resize(x: Tensor, target: Size) -> Tensor:
    """Bicubic cover-resize of (B, C, h, w) to exactly `target`."""
    resized, box = cover(Size(x.shape[-2], x.shape[-1]), target)
    larger = F.interpolate(x, size=(resized.height, resized.width), mode="bicubic", align_corners=False)
    return larger[..., box.rows, box.cols]
