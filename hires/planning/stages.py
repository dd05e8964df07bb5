"""Chooses a render's stages: sizes, sampler, guidance and noise levels.

No budget plays a part. Imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hires.checkpoints.model import ModelSpec, embeds_guidance, schedule_table, sigma_max_for
from hires.errors import RequestError
from hires.options.render import RenderRequest
from hires.options.stage import GuidePlan, StageSpec
from hires.planning.draft import Choice, StageSettings
from hires.planning.plan import StagePlan
from hires.planning.presets import Preset
from hires.planning.resolution import bins_of, stage_canvases
from hires.planning.tiles import place, whole_grid
from hires.refine.renoise import relay_sigma
from hires.sampling import registry
from hires.sampling.registry import SCHEDULE_FACTS
from hires.tiling.geometry import Size, snap

REFINED_STRENGTH = 0.5  # above it the large shapes of `init` are drawn anew, and tiles would each draw their own
UNSET = StageSpec()


def choose_strategy(request: RenderRequest, canvas: Size, spec: ModelSpec) -> Choice[str]:
    """Whether the canvas is drawn at once, in tiles, or from a small picture up."""
    strategy, strength = request.strategy, request.strength
    if request.stages:
        if strategy not in ("auto", "progressive"):
            raise RequestError(
                f"strategy {strategy}: `stages` lists the stages of a progressive render; leave one of the two out"
            )
        return Choice("progressive", "the stages that were asked for")
    several = len(stage_canvases(canvas, bins_of(spec), spec.align_px)) > 1
    if strength is not None and several and strength <= REFINED_STRENGTH and strategy in ("auto", "tiled"):
        return Choice("tiled", f"at strength {strength:g} the picture's own composition holds the tiles together")
    if strategy == "auto":
        return auto_strategy(canvas, spec, several)
    if strategy == "direct" and several:
        return Choice(
            strategy, "as asked for; beyond the trained size expect repeated objects and attention over the whole canvas"
        )
    if strategy == "tiled":
        return Choice(strategy, "as asked for; every tile starts from noise, so expect repeated objects")
    if strategy == "progressive" and not several:
        return Choice("direct", f"progressive was asked for, but {canvas} is one stage for this model")
    return Choice(strategy, "as asked for")


def auto_strategy(canvas: Size, spec: ModelSpec, several: bool) -> Choice[str]:
    """Stages where the canvas takes `several`, else the whole canvas at once."""
    if several:
        return Choice("progressive", f"{canvas} is beyond the model's native {spec.native_px} px; a base picture keeps it one")
    return Choice("direct", f"{canvas} is within the model's native {spec.native_px} px")


def choose_sampler(
    request: RenderRequest, spec: ModelSpec, user: StageSpec = UNSET, preset: StageSpec = UNSET
) -> tuple[Choice[str], Choice[str]]:
    """Sampler and schedule of a stage with the settings `user` and `preset`, or of a render.

    What the user set comes first; then, unless the model is distilled for certain timesteps, the schedule that the sampler
    is usually run on; then the model's own.
    """
    own = preset.sampler or spec.defaults.sampler
    name, schedule = registry.resolve(user.sampler or request.sampler, user.schedule or request.schedule)
    sampler = Choice(name or own, "as asked for" if request.sampler else "the model's own")
    if schedule is not None:
        return sampler, Choice(schedule, "as asked for")
    usual = registry.SAMPLER_FACTS[name].schedule if name and name not in (own, spec.defaults.sampler) else None
    if name is not None and usual is not None and spec.parameterisation in registry.VP and spec.facts.few_step is None:
        return sampler, Choice(usual, f"what {registry.SAMPLER_FACTS[name].label} is usually run on")
    return sampler, Choice(spec.defaults.schedule, "the model's own")


def choose_guidance(request: RenderRequest, spec: ModelSpec) -> Choice[float]:
    """The weight of classifier-free guidance, by default the model's; the cards of few-step models write 0 for none, here 1."""
    if request.guidance is None:
        return Choice(spec.defaults.guidance)
    if spec.facts.few_step and request.guidance == 0:
        return Choice(1.0, "none, as this few-step model's card means it")
    return Choice(float(request.guidance))


def check_combinations(stages: Sequence[StagePlan], spec: ModelSpec) -> None:
    """RequestError for a sampler and a schedule that do not fit the model or each other."""
    for stage in stages:
        registry.check_combination(
            stage.sampler,
            stage.schedule,
            spec.parameterisation,
            moving_tiles=stage.shift_cells > 0,
            few_step=spec.facts.few_step,
            steps=stage.steps,
        )


def check_steps(stages: Sequence[StagePlan], spec: ModelSpec) -> None:
    """RequestError for a stage with more steps than its schedule has timesteps."""
    for stage in stages:
        table = schedule_table(spec, stage.schedule)
        most = None if table is None else registry.most_steps(stage.schedule, table, stage.sigma_start)
        if most is not None and stage.steps > most:
            raise RequestError(
                f"{stage.name} would take {stage.steps} steps of `schedule` {stage.schedule}, which has {most} timesteps below "
                f"sigma {stage.sigma_start:g}: give fewer `steps`, or `schedule` exponential"
            )


def stage_sizes(request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str, growth: float) -> tuple[Size, ...]:
    """The canvases from the base picture to `canvas`, each at most about `growth` times the side of the one before.

    RequestError for stages of the user's that do not grow up to `canvas`.
    """
    if not request.stages:
        return stage_canvases(canvas, bins_of(spec), spec.align_px, growth) if strategy == "progressive" else (canvas,)
    sizes: list[Size] = []
    for stage in request.stages:
        if stage.size is None:
            raise RequestError(f"stages {len(sizes) + 1}: give its size first, such as {canvas},steps=8")
        sizes.append(snap(stage.size, spec.align_px))
    if sizes[-1] != canvas:
        raise RequestError(f"stages: the last is {sizes[-1]} and the picture's canvas {canvas}; give a last stage of that size")
    if any(after.area <= before.area for before, after in itertools.pairwise(sizes)):
        raise RequestError(f"stages: {', '.join(map(str, sizes))} do not grow; give them from small to large")
    return tuple(sizes)


def stage_settings(request: RenderRequest, preset: Preset, spec: ModelSpec, index: int) -> StageSettings:
    """User overrides and preset defaults of stage `index`; relay steps scale with --steps unless the model is distilled."""
    defaults = preset.stage(index)
    if index and request.steps is not None and not spec.facts.few_step:
        share = request.steps / (preset.stages[0].steps or request.steps)
        defaults = replace(defaults, steps=max(1, round((defaults.steps or 1) * share)))
    user = request.stages[index] if request.stages else UNSET
    relayed = index or request.strength is not None
    return StageSettings(index=index, user=user.over(request.relay) if relayed else user, preset=defaults)


def check_strength(request: RenderRequest, steps: int) -> None:
    """RequestError for a strength so small that it leaves no step."""
    strength = request.strength
    if strength is not None and int(steps * strength) < 1:
        raise RequestError(f"strength {strength:g} leaves none of {steps} steps: give {1 / steps:.2g} or more, or more `steps`")


def make_stage(
    settings: StageSettings,
    request: RenderRequest,
    spec: ModelSpec,
    sizes: Sequence[Size],
    strategy: str,
    tile_cells: tuple[int, int],
) -> StagePlan:
    """One stage: its user's settings, else the relay's, else the preset's, else the model's; and its tiles."""
    if settings.index == 0:
        check_strength(request, request.steps or settings.preset.steps or spec.defaults.steps)
    draw = relay_stage if settings.index else base_stage
    stage, size = draw(request, settings, spec, sizes), sizes[settings.index]
    if settings.index == 0 and strategy == "progressive" and size.area <= (2 * spec.native_px) ** 2:
        return stage
    placed = place(stage, settings, request, spec, tile_cells)
    chosen = settings.user.sampler or request.sampler
    if not chosen and placed.shift_cells and registry.SAMPLER_FACTS[placed.sampler].multistep:
        return replace(placed, sampler=spec.defaults.sampler)
    return placed


def base_stage(request: RenderRequest, settings: StageSettings, spec: ModelSpec, sizes: Sequence[Size]) -> StagePlan:
    """The first stage: from noise, or from a given picture by its strength."""
    user, size, drawn_over = settings.user, sizes[0], request.strength is not None
    sampler, schedule = choose_sampler(request, spec, user)
    sigma = user.sigma_start if user.sigma_start and not drawn_over else choose_sigma_max(request, spec, size)
    guided = guidance_range(user, request, spec)
    return StagePlan(
        name="base",
        canvas=size,
        grid=whole_grid(size, spec),
        sigma_start=checked_sigma(sigma, spec),
        steps=user.steps or request.steps or settings.preset.steps or spec.defaults.steps,
        sampler=sampler.value,
        schedule=schedule.value,
        guidance=choose_guidance(request, spec).value if user.guidance is None else user.guidance,
        image_guidance=image_guidance(request, spec),
        strength=request.strength,
        guides=resolved_guides(user, sizes[0], sizes[0]) if drawn_over else (),
        sigma_end=checked_end(user.sigma_end or 0.0, schedule.value),
        guidance_high=guided.high,
        guidance_rescale=guided.rescale,
        guidance_interval=guided.interval,
    )


def relay_stage(request: RenderRequest, settings: StageSettings, spec: ModelSpec, sizes: Sequence[Size]) -> StagePlan:
    """A later stage: the one before enlarged, re-noised and refined."""
    user, index, merged = settings.user, settings.index, settings.merged
    sampler, schedule = choose_sampler(request, spec, user, settings.preset)
    assert merged.steps and merged.sigma_start and merged.enlarger and merged.guidance is not None, "a preset sets all of it"
    start = relay_sigma(merged.renoise or "fixed", merged.sigma_start, sizes[index - 1], sizes[index], sigma_max=spec.sigma_max)
    if user.sigma_start is not None:
        checked_sigma(user.sigma_start, spec)
    guided, weight = guidance_range(merged, request, spec), merged.guidance
    return StagePlan(
        name=f"refine {index}",
        canvas=sizes[index],
        grid=whole_grid(sizes[index], spec),
        sigma_start=checked_sigma(start, spec),
        steps=merged.steps,
        sampler=sampler.value,
        schedule=schedule.value,
        guidance=min(weight, choose_guidance(request, spec).value) if user.guidance is None else user.guidance,
        image_guidance=image_guidance(request, spec),
        enlarger=merged.enlarger,
        guides=resolved_guides(merged, sizes[0], sizes[index]),
        sigma_end=relay_end(settings, schedule.value, start),
        guidance_high=guided.high,
        guidance_rescale=guided.rescale,
        guidance_interval=guided.interval,
    )


def relay_end(settings: StageSettings, schedule: str, start: float) -> float:
    """The last noise level of a later stage; schedules that go down a checkpoint's timesteps end where those end."""
    default = 0.0 if SCHEDULE_FACTS[schedule].table else settings.preset.sigma_end or 0.0
    end = default if settings.user.sigma_end is None else settings.user.sigma_end
    return checked_end(end if end < start else 0.0, schedule)


def image_guidance(request: RenderRequest, spec: ModelSpec) -> float:
    """How closely an edit keeps to its picture."""
    return spec.defaults.image_guidance if request.image_guidance is None else request.image_guidance


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceRange:
    """Where and how guidance acts; see the fields `guidance_...` of `StagePlan`."""

    high: float | None
    rescale: float
    interval: tuple[float, float] | None


def guidance_range(settings: StageSpec, request: RenderRequest, spec: ModelSpec) -> GuidanceRange:
    """Where and how guidance acts. RequestError for a model that edits, which is guided by text and picture."""
    if spec.facts.image_channels and request.guidance_rescale:
        raise RequestError(
            f"guidance_rescale {request.guidance_rescale:g}: is of text guidance, {spec.name} edits with two; leave it out"
        )
    rescale = request.guidance_rescale if settings.guidance_rescale is None else settings.guidance_rescale
    limits = GuidanceRange(
        high=settings.guidance_high,
        rescale=rescale or 0.0,
        interval=settings.guidance_interval,
    )
    if spec.facts.image_channels and (limits.high or limits.rescale or limits.interval):
        raise RequestError(
            f"stage: high, rescale and interval are of text guidance; {spec.name} edits with two: leave them out"
        )
    if embeds_guidance(spec) and (limits.high or limits.rescale or limits.interval):
        raise RequestError(f"stage: high, rescale and interval: {spec.name} is told one guidance scale: leave them out")
    return limits


def resolved_guides(settings: StageSpec, base: Size, size: Size) -> tuple[GuidePlan, ...]:
    """The guides of a stage; a cutoff defaults to the base picture's Nyquist frequency on the stage's canvas."""
    factor = max(1.0, math.sqrt(size.area / base.area))
    return tuple(replace(guide, cutoff=guide.cutoff or 0.5 / factor) for guide in settings.guides or ())


def checked_sigma(sigma: float, spec: ModelSpec) -> float:
    """The noise level. RequestError for one outside the range the model was trained on."""
    if not spec.sigma_min < sigma <= spec.sigma_max:
        raise RequestError(
            f"stage: sigma={sigma:g}: {spec.name} knows levels above {spec.sigma_min:g} and up to {spec.sigma_max:g}"
        )
    return sigma


def checked_end(sigma: float, schedule: str) -> float:
    """The last noise level. RequestError for a schedule that cannot end early."""
    if sigma and SCHEDULE_FACTS[schedule].table:
        raise RequestError(
            f"stage: sigma ends at {sigma:g}, and schedule {schedule} goes down a checkpoint's timesteps: leave the end "
            "out, or take karras or exponential"
        )
    return sigma


def choose_sigma_max(request: RenderRequest, spec: ModelSpec, size: Size) -> float:
    """The noise level that a picture of `size` starts from. RequestError for one outside the model's range."""
    if request.sigma_max is None:
        return spec.sigma_max
    fitting = sigma_max_for(spec, size)
    if isinstance(request.sigma_max, str):
        return fitting
    if not spec.sigma_min < request.sigma_max <= spec.sigma_max:
        raise RequestError(
            f"sigma_max {request.sigma_max:g}: {spec.name} was trained from {spec.sigma_min:g} to {spec.sigma_max:g}; "
            f"give a level between, such as {fitting:.1f}"
        )
    return request.sigma_max
