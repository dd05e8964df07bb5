"""Runs the stages of a plan: draw a base picture, then enlarge and refine it.

Each later stage adds noise up to sigma_s and refines in tiles, until the canvas is reached.

`direct` and `tiled` are plans with one stage; the code is the same. The relay keeps one subject where tiles from noise
would each draw their own (SDEdit, Meng et al. 2022; MegaFusion, ScaleDiff).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hires.checkpoints.model import ModelSpec, sigma_table
from hires.devices.memory import peak_device_bytes, reset_peak
from hires.errors import NotFiniteError
from hires.events import Event, OnEvent, StageStats
from hires.images.whole import fitted
from hires.kernels.attention_policies import NPA, Attending, Policy, Windows
from hires.pipelines.base import Session
from hires.pipelines.progress import TileProgress
from hires.planning.costs.evaluations import stage_levels
from hires.planning.plan import MemoryPlan, StagePlan
from hires.protocols import Denoiser
from hires.refine.enlargers import ENLARGERS, Target
from hires.refine.low_pass import Fourier
from hires.refine.structure import centre_pulled, masked, structure_guided, variance_ramp
from hires.resume.journal import NO_JOURNAL, Journal
from hires.sampling.noise import CanvasNoise, PicturesNoise, StepNoise
from hires.sampling.registry import SCHEDULE_FACTS
from hires.sampling.samplers import as_sigmas, find_sampler
from hires.tiling.denoise import Shift, seeded_shift, tiled
from hires.tiling.geometry import Box, Size
from hires.tiling.resize import Padded
from hires.tiling.retry import Batcher, attempt
from hires.units import gib

log = logging.getLogger(__name__)


@dataclass
class Denoised:
    """Final latents (1, C, h, w) float32 on the CPU, those of the first stage, and what each stage took."""

    latents: Tensor
    first: Tensor = field(default_factory=lambda: torch.empty(0))
    stats: list[StageStats] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Start:
    """A stage before its first step."""

    x: Tensor
    """(B, C, h, w) at sigmas[0]."""
    origin: Tensor | None
    """The latents that x was made from, without noise, where guides or a mask hold the stage to them."""
    sigmas: Tensor
    """The noise levels, falling, ending with 0."""
    noise: PicturesNoise
    """The noise of the canvas of each picture."""
    drawn: Tensor | None = None
    """The mask's share of every cell, (1, 1, h, w): 1 where the picture is drawn anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInput:
    """A stage of a plan, and what its latents depend on beside the model."""

    stage: StagePlan
    index: int
    """The stage's place in the plan, from 0."""
    seeds: tuple[int, ...]
    """One for each picture of the batch."""
    before: Tensor
    """The latents of the stage before, (B, C, h, w); empty for the first stage."""
    picture: NDArray[np.uint8] | None = None
    """(H, W, 3), where the stage starts from a picture by its strength."""
    mask: NDArray[np.uint8] | None = None
    """(H, W), 255 where the picture is drawn anew, 0 where it stays."""


def run(
    session: Session,
    plan: MemoryPlan,
    seed: int,
    on_event: OnEvent,
    picture: NDArray[np.uint8] | None = None,
    journal: Journal = NO_JOURNAL,
    mask: NDArray[np.uint8] | None = None,
) -> Denoised:
    """Run a plan's stages. `on_event` is called after each batch of tiles and may raise to cancel.

    picture: (H, W, 3) of the plan's canvas, where the first stage starts from it by its strength instead of from noise.
    journal: what is in it is not done again. mask: (H, W) of the canvas, 255 where the picture is drawn anew, 0 where it stays.
    """
    result = Denoised(latents=torch.empty(0))
    most = plan.batch
    for index, stage in enumerate(plan.stages):
        batcher = Batcher(min(stage.batch, most), session.weights.relieve)
        inputs = StageInput(stage=stage, index=index, seeds=(seed,), before=result.latents, picture=picture, mask=mask)
        latents, stats = finish_stage(session, inputs, on_event, journal, batcher)
        result.latents, result.first = latents, result.first if index else latents
        result.stats.append(stats)
        most = batcher.batch if batcher.retries else most
        log_stage(plan, stats)
    return result


def first_stage(
    session: Session, stage: StagePlan, seeds: Sequence[int], batch: int, on_event: OnEvent
) -> tuple[Tensor, StageStats]:
    """The first stage of several pictures from noise, (B, C, h, w), `batch` images at once, and what it took for all of them.

    The session's conditions are of B pictures.
    """
    inputs = StageInput(stage=stage, index=0, seeds=tuple(seeds), before=torch.empty(0))
    return finish_stage(session, inputs, on_event, NO_JOURNAL, Batcher(batch, session.weights.relieve))


def finish_stage(
    session: Session, inputs: StageInput, on_event: OnEvent, journal: Journal, batcher: Batcher
) -> tuple[Tensor, StageStats]:
    """The latents of one stage, from the journal where it has them, and what it took."""
    begun, retries, recomputed = time.monotonic(), session.vae.retries, recomputed_parts(session)
    progress = TileProgress(inputs.stage, on_event, session.preview, session.calls(inputs.stage))
    reset_peak(session.device)
    work = partial(run_stage, session, inputs, progress, journal)
    latents, message = journal.tensor(f"stage-{inputs.index}"), ""
    if latents is None:
        latents, message = attempt(work, batcher)
    while latents is None:  # outside the tiles, which have their own retries: the stage begins again with less
        batcher.lessen(batcher.batch, message)
        latents, message = attempt(work, batcher)
    journal.finish_stage(inputs.index, latents)
    progress.finish()
    stats = StageStats(
        stage=inputs.stage.name,
        seconds=round(time.monotonic() - begun, 3),
        peak_bytes=peak_device_bytes(session.device),
        tiles=progress.done,
        retries=batcher.retries + session.vae.retries - retries,
        recomputed=recomputed_parts(session) - recomputed,
    )
    return latents, stats


def log_stage(plan: MemoryPlan, stats: StageStats) -> None:
    """Log what a stage took beside what was planned."""
    planned = next((cost for cost in plan.costs if cost.stage == stats.stage), None)
    if planned is not None:
        peaks, seconds = (gib(stats.peak_bytes), gib(planned.peak_bytes)), (stats.seconds, planned.seconds)
        log.info("stage %s took %.1f s (predicted %.1f), peak %s (predicted %s)", stats.stage, *seconds, *peaks)


def recomputed_parts(session: Session) -> int:
    """Bands and tiles that overflowed in half precision and were computed again, so far."""
    return session.vae.recomputed + session.guard.redone


def run_stage(session: Session, inputs: StageInput, progress: TileProgress, journal: Journal, batcher: Batcher) -> Tensor:
    """The latents of one stage, (B, C, h, w) float32 on the CPU. Run again, it gives the same."""
    stage, mask, cells = inputs.stage, inputs.mask, inputs.stage.grid.canvas
    sigmas, box = stage_sigmas(session.spec, stage), Box(0, 0, cells.height, cells.width)
    channels = session.spec.facts.latent_channels
    noise = PicturesNoise(inputs.seeds, lambda seed: CanvasNoise(seed, inputs.index, box, channels, session.device))
    name = f"stage-{inputs.index}-origin"
    begin = journal.tensor(name)
    if begin is None:
        begin = origin(session, stage, inputs.before, inputs.picture, progress.on_event)
        if begin is not None:
            journal.keep(name, begin)
    begin = None if begin is None else begin.to(session.device)
    drawn = None if mask is None or begin is None else cell_mask(mask, cells).to(session.device)
    reference = begin if stage.guides or drawn is not None else None
    start = Start(noisy(begin, first_sigma(stage, sigmas), noise(-1)), reference, sigmas, noise, drawn)
    del begin  # not held through the stage where no guide needs it
    session.weights.ready("network")
    progress.begin()
    return denoise_stage(session, stage, start, batcher, progress, journal).float().cpu()


def cell_mask(mask: NDArray[np.uint8], cells: Size) -> Tensor:
    """A mask (H, W) of 0 to 255 as shares of latent cells, (1, 1, h, w) in [0, 1]."""
    whole = torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None] / 255
    return F.adaptive_avg_pool2d(whole, (cells.height, cells.width))


def stage_sigmas(spec: ModelSpec, stage: StagePlan) -> Tensor:
    """The noise levels that a stage goes down, ending with 0."""
    return as_sigmas(stage_levels(spec, stage))


def first_sigma(stage: StagePlan, sigmas: Tensor) -> float:
    """The noise to begin with: the plan's own number, but the schedule's where it begins below."""
    return float(sigmas[0]) if SCHEDULE_FACTS[stage.schedule].table or stage.strength is not None else stage.sigma_start


def origin(
    session: Session, stage: StagePlan, before: Tensor, picture: NDArray[np.uint8] | None, on_event: OnEvent
) -> Tensor | None:
    """The latents that a stage starts from, (1, C, h, w): the stage before enlarged, a picture, or None for noise alone."""
    if stage.enlarger is not None:
        hear = (tell(on_event, f"{what} for {stage.name}") for what in ("decode", "encode"))
        target = Target(stage.canvas, stage.grid.canvas, *hear)
        with torch.inference_mode():
            return ENLARGERS[stage.enlarger](session, before, target).to(session.device)
    if stage.strength is not None:
        assert picture is not None, "a strength is of a picture"
        with torch.inference_mode():
            source = Padded(fitted(picture, stage.canvas), stage.canvas)
            return session.encode(source, tell(on_event, "encode")).to(session.device)
    return None


def noisy(begin: Tensor | None, sigma: float, noise: Tensor) -> Tensor:
    """Latents at noise level sigma; from noise alone those of data of unit variance."""
    return noise * float((sigma**2 + 1) ** 0.5) if begin is None else begin + noise * sigma


def tell(on_event: OnEvent, stage: str) -> Callable[[int, int], None]:
    """A function that reports bands done and in all as events of a stage."""
    return lambda done, total: on_event(Event(stage=stage, done=done, total=total))


def denoise_stage(
    session: Session, stage: StagePlan, start: Start, batcher: Batcher, progress: TileProgress, journal: Journal = NO_JOURNAL
) -> Tensor:
    """Sample one stage down to 0: sampler(anchored(guided(tiled(precondition(network)))))."""
    noise = start.noise
    shift = seeded_shift(noise.seed, noise.stage, stage.shift_cells) if stage.shift_cells else None
    network = session.denoiser(attending(stage.attention, shift))
    on_canvas = tiled(network, stage.grid, batch=batcher, kind=stage.blend, shift=shift, on_tiles=progress.advance)
    with torch.inference_mode():
        denoise, cond = session.guided(on_canvas, stage)
        recall = partial(progress.recall, stage.grid.count * progress.calls)
        denoise = journal.recorded(noise.stage, anchored(denoise, stage, start), recall)
        try:
            steps = StepNoise(source=noise, table=sigma_table(session.spec))
            return find_sampler(stage.sampler)(denoise, start.x, start.sigmas, cond, steps, progress.step)
        except NotFiniteError as error:
            step = f"step {progress.steps_done + 1} of {stage.taken_steps}"
            raise NotFiniteError(f"stage {stage.name}, {step}: {error}") from None


def anchored(denoise: Denoiser, stage: StagePlan, start: Start) -> Denoiser:
    """The canvas's estimate under the guides of a stage, each around the one before, and under its mask.

    The same denoiser where the stage is held to no picture.
    """
    if start.origin is None:
        return denoise
    first = float(start.sigmas[0])
    for guide in stage.guides:
        if guide.kind == "structure":
            assert guide.cutoff is not None, "a plan's guides are resolved"
            denoise = structure_guided(denoise, start.origin, variance_ramp(first), Fourier(guide.cutoff))
        else:
            denoise = centre_pulled(denoise, start.origin, first)
    return denoise if start.drawn is None else masked(denoise, start.origin, start.drawn)


def attending(policy: Policy, shift: Shift | None) -> Attending:
    """The policy at every noise level, the grid of its blocks moved where it has one and a shift is given."""
    if shift is None or not isinstance(policy, NPA | Windows):
        return lambda time: policy
    return lambda time: replace(policy, shift=shift(time))
