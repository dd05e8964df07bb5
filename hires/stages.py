"""What is drawn: strategy, stages, tiles, sampler, guidance and attention of a request. No budget has a say in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hires import catalogue
from hires.errors import RequestError
from hires.kernels.policies import NPA, Global, KVPool, Policy, Windows, make_policy
from hires.resolution import round_up, stage_canvases
from hires.specs import ModelSpec, sigma_max_for, sigma_table
from hires.tiling.geometry import Size, make_grid
from hires.types import RenderRequest, StagePlan, parse_policy

REFINED_STRENGTH = 0.5  # above it a picture's large shapes are drawn anew, and tiles would each draw their own
LEAST_WINDOW = 4  # tokens of the lowest level that a window of attention spans


def choose_strategy(request: RenderRequest, canvas: Size, spec: ModelSpec) -> tuple[str, str]:
    asked, strength = request.strategy, request.strength
    several = len(stage_canvases(canvas, spec.bins, spec.align_px)) > 1
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


def choose_tile(request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str) -> tuple[int, int]:
    """Tile and overlap in cells. Beyond `direct`, the trained size unless asked otherwise."""
    step = spec.align_px // spec.cell_px
    if strategy == "direct":
        return max(canvas.height, canvas.width) // spec.cell_px, 0
    tile_px = request.tile_px or spec.defaults.tile_px
    tile = max(step, round_up(tile_px, spec.align_px) // spec.cell_px)
    default_px = min(spec.defaults.overlap_px, tile * spec.cell_px // 4)
    overlap_px = default_px if request.overlap_px is None else request.overlap_px
    if request.overlap_px is not None and overlap_px >= tile * spec.cell_px:
        raise RequestError(
            f"--overlap {overlap_px}: must be below the tile of {tile * spec.cell_px} px; try {tile * spec.cell_px // 4}"
        )
    return tile, overlap_px // spec.cell_px


def choose_policy(request: RenderRequest, spec: ModelSpec) -> Policy:
    """Whom self-attention attends to beyond the trained size, counted in latent cells; windows are of the trained size
    unless one is asked for. RequestError for a window that is none, and beside tiles."""
    asked = parse_policy(request.attention_policy)
    option = f"--attention-policy {request.attention_policy}"
    if asked.name == "global":
        return Global()
    if request.strategy == "tiled" or request.tile_px or request.overlap_px:
        raise RequestError(f"{option}: goes over the whole canvas; leave --tile, --overlap and --strategy tiled out")
    if asked.name == "kvpool" or asked.value is None:
        return make_policy(asked.name, spec.native_px // spec.cell_px, asked.value)
    if asked.value < LEAST_WINDOW * spec.align_px:
        raise RequestError(f"{option}: give a window of {LEAST_WINDOW * spec.align_px} px or more")
    return make_policy(asked.name, spec.native_px // spec.cell_px, asked.value // spec.cell_px)


def policy_notes(request: RenderRequest, stages: Sequence[StagePlan], spec: ModelSpec) -> Iterator[str]:
    """Every approximation of attention is named; RequestError where no stage would use it."""
    if parse_policy(request.attention_policy).name == "global":
        return
    used = [stage for stage in stages if stage.attention != Global()]
    if not used:
        yield f"attention {request.attention_policy} changes nothing: {stages[-1].canvas} is within the trained size"
        return
    policy = used[-1].attention
    reach = {NPA: "a neighbourhood of", Windows: "a window of"}.get(type(policy))
    if isinstance(policy, NPA | Windows):
        what = f"attends to {reach} {policy.window * spec.cell_px} px over the whole canvas"
    elif isinstance(policy, KVPool):
        what = f"attends to keys averaged {policy.r} x {policy.r} over the whole canvas"
    else:
        what = "attends to the whole canvas, its scores scaled for the greater length"
    yield f"approximation: self-attention {what}, as asked for ({', '.join(stage.name for stage in used)})"


def choose_sampler(request: RenderRequest, spec: ModelSpec) -> tuple[str, str, str]:
    """Sampler, schedule and why that schedule: what the request says; else, for a model with timesteps that is not distilled
    for certain ones, what the sampler asked for is usually run on; else the model's own."""
    sampler, schedule = catalogue.resolve(request.sampler, request.schedule)
    if schedule is not None:
        return sampler or spec.defaults.sampler, schedule, "as asked for"
    own = sampler == spec.defaults.sampler
    usual = catalogue.SAMPLERS[sampler].schedule if sampler is not None and not own else None
    if sampler is not None and usual is not None and spec.parameterisation in catalogue.VP and spec.facts.few_step is None:
        return sampler, usual, f"what {catalogue.SAMPLERS[sampler].label} is usually run on"
    return sampler or spec.defaults.sampler, spec.defaults.schedule, "the model's own"


def choose_guidance(request: RenderRequest, spec: ModelSpec) -> float:
    """The model's own unless asked for. The cards of few-step models write 0 for none, which is 1 here."""
    if request.guidance is None:
        return spec.defaults.guidance
    return 1.0 if spec.facts.few_step and request.guidance == 0 else float(request.guidance)


def guidance_notes(request: RenderRequest, spec: ModelSpec) -> Iterator[str]:
    guidance = choose_guidance(request, spec)
    if request.guidance is not None and guidance != request.guidance:
        yield f"guidance {request.guidance:g} taken as 1: none, as this few-step model's card means it"
    elif guidance < 1:
        yield f"guidance {guidance:g}: below 1 the picture leans to the negative prompt"
    if guidance == 1.0 and request.negative:
        yield "the negative prompt has no say at guidance 1"


def check_steps(stages: Sequence[StagePlan], spec: ModelSpec) -> None:
    """RequestError for more steps than a schedule has timesteps, in any stage."""
    table = sigma_table(spec)
    for stage in stages:
        most = None if table is None else catalogue.most_steps(stage.schedule, table, stage.sigma_start)
        if most is not None and stage.steps > most:
            raise RequestError(
                f"{stage.name} would take {stage.steps} steps of --schedule {stage.schedule}, which has {most} timesteps below "
                f"sigma {stage.sigma_start:g}: give fewer --steps, or --schedule exponential"
            )


def sampler_notes(request: RenderRequest, stages: Sequence[StagePlan], spec: ModelSpec) -> Iterator[str]:
    """What was chosen and why; RequestError for a sampler and a schedule that do not fit the model or each other."""
    sampler, schedule, why = choose_sampler(request, spec)
    catalogue.check_combination(
        sampler,
        schedule,
        spec.parameterisation,
        moving_tiles=any(stage.shift_cells for stage in stages),
        few_step=spec.facts.few_step,
        steps=max(stage.steps for stage in stages),
    )
    chosen = "as asked for" if request.sampler else "the model's own"
    yield f"sampler {sampler}: {chosen}; schedule {schedule}: {why}"
    if not catalogue.SAMPLERS[sampler].known:
        yield (
            f"{sampler} takes as many evaluations as its tolerance asks for, whatever --steps says: "
            f"{catalogue.ADAPTIVE_EVALUATIONS} per stage are an estimate"
        )


def make_stages(
    request: RenderRequest, canvas: Size, spec: ModelSpec, strategy: str, tile: int, overlap: int
) -> tuple[StagePlan, ...]:
    defaults = spec.defaults
    steps = request.steps or defaults.steps
    guidance = choose_guidance(request, spec)
    image_guidance = defaults.image_guidance if request.image_guidance is None else request.image_guidance
    sampler, schedule, _ = choose_sampler(request, spec)
    share = 1.0 if spec.facts.few_step else steps / defaults.steps  # a few-step model relays as it was distilled
    relay_steps = max(1, round(defaults.relay_steps * share))
    strength = request.strength
    if strength is not None and int(steps * strength) < 1:
        raise RequestError(
            f"--strength {strength:g} leaves none of {steps} steps: give {1 / steps:.2g} or more, or more --steps"
        )
    policy = choose_policy(request, spec)
    moves = parse_policy(request.attention_policy).shift
    sizes = stage_canvases(canvas, spec.bins, spec.align_px) if strategy == "progressive" else (canvas,)
    stages = []
    for index, size in enumerate(sizes):
        cells = size.divided(spec.cell_px)
        first = index == 0
        beyond = not (first and strategy == "progressive") and len(stage_canvases(size, spec.bins, spec.align_px)) > 1
        attention = policy if beyond else Global()
        within = first and strategy == "progressive" and cells.area <= (2 * spec.native_px // spec.cell_px) ** 2
        whole = within or attention != Global()
        grid = make_grid(cells, cells, 0) if whole else make_grid(cells, Size(tile, tile), overlap)
        stages.append(
            StagePlan(
                name="base" if first else f"refine {index}",
                canvas=size,
                grid=grid,
                sigma_start=choose_sigma_max(request, spec, size) if first else min(defaults.relay_sigma, spec.sigma_max),
                steps=steps if first else relay_steps,
                sampler=sampler,
                schedule=schedule,
                guidance=guidance if first else min(guidance, defaults.relay_guidance),
                image_guidance=image_guidance,
                strength=strength if first else None,
                enlarger=None if first else defaults.enlarger,
                attention=attention,
                shift_cells=attention.window // 4 if moves and isinstance(attention, NPA | Windows) else 0,
            )
        )
    return tuple(stages)


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


def estimates_per_step(stage: StagePlan, spec: ModelSpec) -> int:
    """How many conditions a step evaluates: an edit three, guidance two, none one."""
    if spec.facts.image_channels:
        return 3
    return 1 if stage.guidance == 1.0 else 2
