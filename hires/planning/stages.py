"""What is drawn: strategy, stages, tiles, sampler, guidance and attention of a request. No budget has a say in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hires.checkpoints.spec import ModelSpec, sigma_max_for, sigma_table
from hires.errors import RequestError
from hires.options.render import RenderRequest
from hires.options.stage import NOTHING_SAID, GuidePlan, StageSpec
from hires.planning.plan import StagePlan
from hires.planning.presets import Preset, preset
from hires.planning.resolution import bins_of, stage_canvases
from hires.planning.tiles import place, whole_grid
from hires.refine.renoise import relay_sigma
from hires.sampling import registry
from hires.sampling.registry import SCHEDULES
from hires.tiling.geometry import Size, snap

REFINED_STRENGTH = 0.5  # above it a picture's large shapes are drawn anew, and tiles would each draw their own


def choose_strategy(request: RenderRequest, canvas: Size, spec: ModelSpec) -> tuple[str, str]:
    asked, strength = request.strategy, request.strength
    if request.stages:
        if asked not in ("auto", "progressive"):
            raise RequestError(
                f"--strategy {asked}: --stage lists the stages of a progressive render; leave one of the two out"
            )
        return "progressive", "the stages that were asked for"
    several = len(stage_canvases(canvas, bins_of(spec), spec.align_px)) > 1
    if strength is not None and several and strength <= REFINED_STRENGTH and asked in ("auto", "tiled"):
        return "tiled", f"at strength {strength:g} the picture's own composition holds the tiles together"
    if asked == "auto":
        if several:
            return (
                "progressive",
                f"{canvas} is beyond the model's native {spec.native_px} px; a base picture keeps it one",
            )
        return "direct", f"{canvas} is within the model's native {spec.native_px} px"
    if asked == "direct" and several:
        return asked, "as asked for; beyond the trained size expect repeated objects and attention over the whole canvas"
    if asked == "tiled":
        return asked, "as asked for; every tile starts from noise, so expect repeated objects"
    if asked == "progressive" and not several:
        return "direct", f"progressive was asked for, but {canvas} is one stage for this model"
    return asked, "as asked for"


def choose_sampler(
    request: RenderRequest, spec: ModelSpec, wanted: StageSpec = NOTHING_SAID, behind: StageSpec = NOTHING_SAID
) -> tuple[str, str, str]:
    """Sampler, schedule and why that schedule: what the request says; else, for a model with timesteps that is not distilled
    for certain ones, what the sampler asked for is usually run on; else the model's own. wanted: what a stage says of it;
    behind: what its preset does."""
    own = behind.sampler or spec.defaults.sampler
    sampler, schedule = registry.resolve(wanted.sampler or request.sampler, wanted.schedule or request.schedule)
    if schedule is not None:
        return sampler or own, schedule, "as asked for"
    usual = registry.SAMPLERS[sampler].schedule if sampler and sampler not in (own, spec.defaults.sampler) else None
    if sampler is not None and usual is not None and spec.parameterisation in registry.VP and spec.facts.few_step is None:
        return sampler, usual, f"what {registry.SAMPLERS[sampler].label} is usually run on"
    return sampler or own, spec.defaults.schedule, "the model's own"


def choose_guidance(request: RenderRequest, spec: ModelSpec) -> float:
    """The model's own unless asked for. The cards of few-step models write 0 for none, which is 1 here."""
    if request.guidance is None:
        return spec.defaults.guidance
    return 1.0 if spec.facts.few_step and request.guidance == 0 else float(request.guidance)


def check_steps(stages: Sequence[StagePlan], spec: ModelSpec) -> None:
    """RequestError for more steps than a schedule has timesteps, in any stage."""
    table = sigma_table(spec)
    for stage in stages:
        most = None if table is None else registry.most_steps(stage.schedule, table, stage.sigma_start)
        if most is not None and stage.steps > most:
            raise RequestError(
                f"{stage.name} would take {stage.steps} steps of --schedule {stage.schedule}, which has {most} timesteps below "
                f"sigma {stage.sigma_start:g}: give fewer --steps, or --schedule exponential"
            )


def make_stages(
    request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str, tile: int, overlap: int
) -> tuple[StagePlan, ...]:
    """The stages of a request: what it says of each, else of the relay, else its preset, else the model."""
    made = preset(request.preset, spec)
    sizes = stage_sizes(request, canvas, spec, strategy, made.growth)
    strength, steps = request.strength, request.steps or made.stages[0].steps or spec.defaults.steps
    if strength is not None and int(steps * strength) < 1:
        raise RequestError(
            f"--strength {strength:g} leaves none of {steps} steps: give {1 / steps:.2g} or more, or more --steps"
        )
    stages: list[StagePlan] = []
    for index, size in enumerate(sizes):
        told, behind = said(request, made, spec, index)
        drawn = relay_stage if index else base_stage
        stage = drawn(request, told, behind, spec, sizes, index)
        base = index == 0 and strategy == "progressive" and size.area <= (2 * spec.native_px) ** 2
        placed = stage if base else place(stage, told, behind, request, spec, (tile, overlap))
        unasked = not (told.sampler or request.sampler)
        if unasked and placed.shift_cells and registry.SAMPLERS[placed.sampler].multistep:
            placed = replace(placed, sampler=spec.defaults.sampler)
        stages.append(placed)
    return tuple(stages)


def stage_sizes(request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str, growth: float) -> tuple[Size, ...]:
    """The canvases that a render goes through. RequestError for stages asked for that do not grow to the last."""
    if not request.stages:
        return stage_canvases(canvas, bins_of(spec), spec.align_px, growth) if strategy == "progressive" else (canvas,)
    found: list[Size] = []
    for spec_of_stage in request.stages:
        if spec_of_stage.size is None:
            raise RequestError(f"--stage {len(found) + 1}: give its size first, such as {canvas},steps=8")
        found.append(snap(spec_of_stage.size, spec.align_px))
    if found[-1] != canvas:
        raise RequestError(
            f"--stage: the last is {found[-1]} and the picture's canvas {canvas}; give a last stage of that size"
        )
    if any(after.area <= before.area for before, after in itertools.pairwise(found)):
        raise RequestError(f"--stage: {', '.join(map(str, found))} do not grow; give them from small to large")
    return tuple(found)


def said(request: RenderRequest, made: Preset, spec: ModelSpec, index: int) -> tuple[StageSpec, StageSpec]:
    """What the user says of a stage, and the preset behind it, its number of steps being the request's share."""
    behind = made.stage(index)
    if index and request.steps is not None and not spec.facts.few_step:  # a few-step model relays as it was distilled
        share = request.steps / (made.stages[0].steps or request.steps)
        behind = replace(behind, steps=max(1, round((behind.steps or 1) * share)))
    told = request.stages[index] if request.stages else NOTHING_SAID
    return told.over(request.relay) if index or request.strength is not None else told, behind


def base_stage(
    request: RenderRequest, told: StageSpec, behind: StageSpec, spec: ModelSpec, sizes: Sequence[Size], index: int
) -> StagePlan:
    """The first stage: from noise, or from a picture by its strength."""
    sampler, schedule, _ = choose_sampler(request, spec, told)
    size, drawn_over = sizes[0], request.strength is not None
    sigma = told.sigma_start if told.sigma_start and not drawn_over else choose_sigma_max(request, spec, size)
    return StagePlan(
        name="base",
        canvas=size,
        grid=whole_grid(size, spec),
        sigma_start=checked_sigma(sigma, spec),
        steps=told.steps or request.steps or behind.steps or spec.defaults.steps,
        sampler=sampler,
        schedule=schedule,
        guidance=choose_guidance(request, spec) if told.guidance is None else told.guidance,
        image_guidance=image_guidance(request, spec),
        strength=request.strength,
        guides=resolved_guides(told, sizes[0], sizes[0]) if drawn_over else (),
        sigma_end=checked_end(told.sigma_end or 0.0, schedule),
        **guidance_policy(told, spec),
    )


def relay_stage(
    request: RenderRequest, told: StageSpec, behind: StageSpec, spec: ModelSpec, sizes: Sequence[Size], index: int
) -> StagePlan:
    """A later stage: the one before enlarged, re-noised and refined."""
    sampler, schedule, _ = choose_sampler(request, spec, told, behind)
    wanted = told.over(behind)
    assert wanted.steps and wanted.sigma_start and wanted.enlarger and wanted.guidance is not None, "a preset says all of it"
    start = relay_sigma(wanted.renoise or "fixed", wanted.sigma_start, sizes[index - 1], sizes[index], sigma_max=spec.sigma_max)
    if told.sigma_start is not None:
        checked_sigma(told.sigma_start, spec)
    table = SCHEDULES[schedule].table
    end = told.sigma_end if told.sigma_end is not None else 0.0 if table else behind.sigma_end or 0.0
    return StagePlan(
        name=f"refine {index}",
        canvas=sizes[index],
        grid=whole_grid(sizes[index], spec),
        sigma_start=checked_sigma(start, spec),
        steps=wanted.steps,
        sampler=sampler,
        schedule=schedule,
        guidance=min(wanted.guidance, choose_guidance(request, spec)) if told.guidance is None else told.guidance,
        image_guidance=image_guidance(request, spec),
        enlarger=wanted.enlarger,
        guides=resolved_guides(wanted, sizes[0], sizes[index]),
        sigma_end=checked_end(end if end < start else 0.0, schedule),
        **guidance_policy(wanted, spec),
    )


def image_guidance(request: RenderRequest, spec: ModelSpec) -> float:
    return spec.defaults.image_guidance if request.image_guidance is None else request.image_guidance


def guidance_policy(wanted: StageSpec, spec: ModelSpec) -> dict[str, Any]:
    """The fields of a stage that say how its guidance acts. RequestError for a model whose guidance is of another kind."""
    given = {
        "guidance_high": wanted.guidance_high,
        "guidance_rescale": wanted.guidance_rescale or 0.0,
        "guidance_interval": wanted.guidance_interval,
    }
    if spec.facts.image_channels and any(given.values()):
        raise RequestError(
            f"stage: high, rescale and interval are of text guidance; {spec.name} edits with two: leave them out"
        )
    return given


def resolved_guides(wanted: StageSpec, base: Size, size: Size) -> tuple[GuidePlan, ...]:
    """The guides of a stage with their cutoffs: by default the base picture's Nyquist frequency on the stage's canvas."""
    factor = max(1.0, math.sqrt(size.area / base.area))
    return tuple(replace(guide, cutoff=guide.cutoff or 0.5 / factor) for guide in wanted.guides or ())


def checked_sigma(sigma: float, spec: ModelSpec) -> float:
    """RequestError for a noise level that the model does not know."""
    if not spec.sigma_min < sigma <= spec.sigma_max:
        raise RequestError(
            f"stage: sigma={sigma:g}: {spec.name} knows levels above {spec.sigma_min:g} and up to {spec.sigma_max:g}"
        )
    return sigma


def checked_end(sigma: float, schedule: str) -> float:
    """RequestError where a schedule ends where its timesteps end."""
    if sigma and SCHEDULES[schedule].table:
        raise RequestError(
            f"stage: sigma ends at {sigma:g}, and schedule {schedule} goes down a checkpoint's timesteps: leave the end "
            "out, or take karras or exponential"
        )
    return sigma


def choose_sigma_max(request: RenderRequest, spec: ModelSpec, size: Size) -> float:
    """The noise level that a picture of that size starts from; RequestError where the model has no choice, or not that one."""
    if request.sigma_max is None:
        return spec.sigma_max
    fitting = sigma_max_for(spec, size)
    if isinstance(request.sigma_max, str):
        return fitting
    if not spec.sigma_min < request.sigma_max <= spec.sigma_max:
        raise RequestError(
            f"--sigma-max {request.sigma_max:g}: {spec.name} was trained from {spec.sigma_min:g} to {spec.sigma_max:g}; "
            f"give a level between, such as {fitting:.1f}"
        )
    return request.sigma_max
