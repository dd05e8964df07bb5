"""From a request, a model and a device to a plan: every choice is made here, before the first kernel, with its reason.

Pure functions of shapes, no torch. First version: it walks candidates from fast to small and takes the first that fits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hires import catalogue, cost
from hires.errors import BudgetError, RequestError
from hires.kernels.policies import NPA, Global, KVPool, Policy, Windows, make_policy
from hires.resolution import check_size, relay_note, round_up, snap, stage_canvases
from hires.specs import ModelSpec, sigma_max_for, sigma_table
from hires.text_cost import text_live_bytes
from hires.tiling.geometry import Size, make_grid
from hires.types import (
    BYTES_PER_ELEMENT,
    VAE_POLICIES,
    DecodePlan,
    DeviceSpec,
    MemoryPlan,
    RenderRequest,
    Rung,
    StageCost,
    StagePlan,
    gib,
    parse_policy,
)

CPU_BUDGET_BYTES = 2 * 2**30  # larger tiles gain nothing on a CPU
CPU_CORE_FLOPS = 25e9  # sustained float32 convolutions per core, measured on a 2.6 GHz server core
CARD_FLOPS = 80e12  # half the dense bf16 rate of a 24 GB card of 2022, the planning assumption for `--vram` alone
LARGE_TOWER = 10**9  # parameters above which text towers are weighed against host memory
BATCHES = (16, 8, 4, 2, 1)
CPU_BATCHES = (4, 2, 1)
REFINED_STRENGTH = 0.5  # above it a picture's large shapes are drawn anew, and tiles would each draw their own
LEAST_WINDOW = 4  # tokens of the lowest level that a window of attention spans
CANVAS_BUFFERS = 6  # float32 copies of the canvas latents a step holds, besides what its sampler keeps


def host_device(budget_bytes: int | None = None) -> DeviceSpec:
    """The CPU of this machine, described without torch."""
    cores = os.cpu_count() or 1
    free = available_host_bytes()
    budget = budget_bytes or min(CPU_BUDGET_BYTES, free // 2)
    most = 0 if budget_bytes else 4 * free // 5
    return DeviceSpec(
        name=f"CPU, {cores} cores", kind="cpu", budget_bytes=budget, flops=cores * CPU_CORE_FLOPS, bf16=False, most_bytes=most
    )


def available_host_bytes() -> int:
    """Host memory that can still be had without swapping; a guess of 8 GiB where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 8 * 2**30


def described_card(budget_bytes: int) -> DeviceSpec:
    """A card that is not here: `--vram` alone on a machine without one asks for its plan."""
    name = f"a card with {gib(budget_bytes)}"
    return DeviceSpec(name=name, kind="cuda", budget_bytes=budget_bytes, flops=CARD_FLOPS, bf16=True, elsewhere=True)


def plan(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> MemoryPlan:
    """Choose canvas, strategy, stages, tiles, batch, dtype and decode tiles for the device's budget.

    A CPU's budget that nobody gave grows where nothing fits it. RequestError for values that contradict each other;
    BudgetError, with the smallest budget that would do, where nothing fits.
    """
    try:
        return _plan(request, spec, device)
    except BudgetError:
        weights = resident_bytes(spec, "fp32", "fp32")
        if device.most_bytes - weights <= device.budget_bytes:
            raise
    larger = replace(device, budget_bytes=device.most_bytes - weights, most_bytes=0)
    made = _plan(request, spec, larger)
    note = f"budget {gib(larger.budget_bytes)}, of free memory less the weights: {gib(device.budget_bytes)} is too small"
    return replace(made, notes=(*made.notes, note))


def _plan(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> MemoryPlan:
    check_size(request.size)
    canvas = snap(request.size, spec.align_px)
    notes: list[str] = list(spec.notes)
    if canvas != request.size:
        notes.append(f"canvas {canvas} is the next multiple of {spec.align_px} px; {request.size} is cut from it")
    strategy, why = choose_strategy(request, canvas, spec)
    notes.append(f"strategy {strategy}: {why}")
    dtype, why = choose_dtype(request.dtype, device)
    notes.append(f"dtype {dtype}: {why}")
    tile, overlap = choose_tile(request, canvas, spec, strategy)
    stages = make_stages(request, canvas, spec, strategy, tile, overlap)
    notes.append(relay_note(tuple(stage.canvas for stage in stages), spec.bins))
    if request.sigma_max is not None:
        notes.append(
            f"starts from sigma {stages[0].sigma_start:g} instead of the checkpoint's {spec.sigma_max:g}: "
            + ("what goes with the size" if request.sigma_max == "auto" else "as asked for")
        )
    notes += policy_notes(request, stages, spec)
    tile_px = tile * spec.cell_px
    asked = "as asked for" if request.tile_px == tile_px else f"--tile {request.tile_px} rounded up to {spec.align_px} px"
    notes.append(
        f"tiles of {tile_px} px, {overlap * spec.cell_px} px shared: "
        + (asked if request.tile_px else "what the model was trained at")
        if any(stage.grid.count > 1 for stage in stages)
        else "no latent tiling: one tile covers the canvas"
    )
    text = choose_text(spec, device, dtype)
    notes += text.notes
    notes += sampler_notes(request, stages, spec)
    notes += guidance_notes(request, spec)
    check_steps(stages, spec)
    batch, why = choose_batch(stages, spec, device, dtype)
    notes.append(f"tile batch {batch}: {why}")
    decode, why = choose_decode(stages, spec, device, dtype)
    notes.append(why)
    if decode.dtype != dtype:
        notes.append(f"decode in {decode.dtype}: an SDXL-type VAE overflows in fp16, and bf16 is enough for 8 bits")
    costs = [stage_cost(stage, spec, device, batch, dtype) for stage in stages]
    if request.tiny_vae is not None:
        extra = cost.preview_bytes(4 if device.kind == "cpu" else 2, device.kind == "cpu")
        costs = [replace(made, peak_bytes=made.peak_bytes + extra) for made in costs]
        notes.append(f"previews by {request.tiny_vae}: up to {gib(extra)} after each step")
    for index in range(1, len(stages)):
        flops = costs[index].flops + enlarge_flops(stages[index - 1].canvas, stages[index], spec)
        peak = max(costs[index].peak_bytes, decode_cost(stages[index].canvas, decode, spec, device, dtype).peak_bytes)
        costs[index] = replace(costs[index], flops=flops, seconds=flops / device.flops, peak_bytes=peak)
    costs += [decode_cost(canvas, decode, spec, device, dtype), text.cost]
    return MemoryPlan(
        model=spec.name,
        output=request.size,
        canvas=canvas,
        strategy=strategy,
        stages=stages,
        decode=decode,
        batch=batch,
        dtype=dtype,
        device=device.name,
        budget_bytes=device.budget_bytes,
        offload="none" if device.kind == "cpu" else "text encoders freed after use",
        backends=(),
        costs=tuple(costs),
        ladder=(*make_ladder(canvas, batch, decode, spec, device, dtype), *tiny_rung(request, decode)),
        notes=tuple(notes),
        text_on_host=text.on_host,
        text_dtype=text.dtype,
    )


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


def choose_dtype(asked: str, device: DeviceSpec) -> tuple[str, str]:
    if asked != "auto":
        return asked, "as asked for"
    if device.kind == "cpu":
        return "fp32", "the CPU's exact and, for small models, fastest type"
    return ("bf16", "half the bytes, no overflow") if device.bf16 else ("fp16", "this card has no bf16")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """Where the text towers run and in which type: they are loaded, used for both prompts, and freed."""

    cost: StageCost
    on_host: bool
    dtype: str
    notes: tuple[str, ...] = ()


def choose_text(spec: ModelSpec, device: DeviceSpec, dtype: str) -> TextPlan:
    """On the device where the towers fit its budget, else on the CPU; T5 never in fp16, which it overflows.

    BudgetError where this machine's memory does not hold them either.
    """
    t5 = "t5" in spec.facts.text
    wanted = "bf16" if t5 and dtype == "fp16" else dtype
    flops = 2.0 * spec.text_params * 2 * spec.facts.tokens
    weights = spec.text_params * BYTES_PER_ELEMENT[wanted]
    working = text_live_bytes(spec.facts.text, 2, spec.facts.tokens, BYTES_PER_ELEMENT[wanted])
    on_device = StageCost(stage="text", peak_bytes=weights + working, flops=flops, seconds=flops / device.flops)
    if device.kind != "cpu" and on_device.peak_bytes <= device.budget_bytes:
        return TextPlan(cost=on_device, on_host=False, dtype=wanted)
    seconds = flops / ((os.cpu_count() or 1) * CPU_CORE_FLOPS)
    on_host = replace(on_device, peak_bytes=0, seconds=seconds)
    notes = (
        ()
        if device.kind == "cpu"
        else (f"text encoders run on the CPU: they need {gib(weights)} of {gib(device.budget_bytes)}",)
    )
    if spec.text_params < LARGE_TOWER:
        return TextPlan(cost=on_host, on_host=device.kind != "cpu", dtype="fp32", notes=notes)
    free = available_host_bytes()
    fitting = next((kind for kind in ("fp32", "bf16") if spec.text_params * BYTES_PER_ELEMENT[kind] <= 0.8 * free), None)
    if fitting is None and not device.elsewhere:
        raise BudgetError(
            f"text encoders need {gib(spec.text_params * 2)} of host memory in bf16, {gib(free)} are free: close other programs"
        )
    chosen = fitting or "bf16"
    size = gib(spec.text_params * BYTES_PER_ELEMENT[chosen])
    notes = (*notes, f"text encoders in {chosen}: {size} of host memory while the prompts are encoded, then freed")
    return TextPlan(cost=on_host, on_host=device.kind != "cpu", dtype=chosen, notes=notes)


def choose_batch(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str) -> tuple[int, str]:
    """The largest tile batch that fits. BudgetError names the bytes one tile needs."""
    most = max(stage.grid.count for stage in stages)
    candidates = [b for b in (CPU_BATCHES if device.kind == "cpu" else BATCHES) if b <= max(1, most)]
    text = choose_text(spec, device, dtype).cost.peak_bytes
    for batch in candidates:
        peak = max(text, *(stage_cost(stage, spec, device, batch, dtype).peak_bytes for stage in stages))
        if peak <= device.budget_bytes:
            return batch, f"peak {gib(peak)} of {gib(device.budget_bytes)}"
    raise too_small(stages, spec, device, dtype)


def too_small(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str) -> BudgetError:
    """The stage that needs most at its cheapest setting, and the budget with which every stage would run."""
    canvas = stages[-1].canvas
    decodes = [decode_cost(canvas, way, spec, device, dtype) for way in decode_plans(canvas, spec, device)]
    costs = [stage_cost(stage, spec, device, 1, dtype) for stage in stages]
    costs += [min(decodes, key=lambda cost: cost.peak_bytes)]
    worst = max(costs, key=lambda cost: cost.peak_bytes)
    move = f"--vram {worst.peak_bytes / 1e9 + 0.1:.1f}GB would do"
    if any(stage.grid.count == 1 and stage.canvas.area > 2 * spec.native_px**2 for stage in stages):
        move += ", or --strategy progressive"
    return BudgetError(f"{worst.stage} at {canvas} needs {gib(worst.peak_bytes)}, budget {gib(device.budget_bytes)}: {move}")


def stage_cost(stage: StagePlan, spec: ModelSpec, device: DeviceSpec, batch: int, dtype: str) -> StageCost:
    """Peak bytes, FLOPs and seconds of one denoising stage; guidance other than 1 doubles the batch of every tile."""
    tile = stage.grid.tile
    element, cpu = BYTES_PER_ELEMENT[dtype], device.kind == "cpu"
    estimates = estimates_per_step(stage, spec)
    pictures = estimates * min(batch, stage.grid.count)
    live = cost.network_live_bytes(spec.network, tile, pictures, element, cpu, spec.facts.tokens, stage.attention)
    buffers = CANVAS_BUFFERS + catalogue.SAMPLERS[stage.sampler].kept
    canvas = buffers * 4 * spec.facts.latent_channels * stage.grid.canvas.area
    weights = 0 if cpu else resident_bytes(spec, dtype, decode_dtype(device))
    evaluations = catalogue.evaluations(stage.sampler, stage.taken_steps) * estimates
    flops = (
        evaluations
        * stage.grid.count
        * cost.network_flops(spec.network, tile.height, tile.width, spec.facts.tokens, stage.attention)
    )
    return StageCost(stage=stage.name, peak_bytes=weights + live + canvas, flops=flops, seconds=flops / device.flops)


def estimates_per_step(stage: StagePlan, spec: ModelSpec) -> int:
    """How many conditions a step evaluates: an edit three, guidance two, none one."""
    if spec.facts.image_channels:
        return 3
    return 1 if stage.guidance == 1.0 else 2


def decode_dtype(device: DeviceSpec) -> str:
    """The VAE's type: an SDXL-type VAE overflows in fp16, so bf16 where there is one, else fp32."""
    return "bf16" if device.kind != "cpu" and device.bf16 else "fp32"


def resident_bytes(spec: ModelSpec, dtype: str, vae_dtype: str) -> int:
    """Weights that stay on a card for the whole render: network and VAE; the text towers are freed before."""
    return spec.network_params * BYTES_PER_ELEMENT[dtype] + spec.vae_params * BYTES_PER_ELEMENT[vae_dtype]


def enlarge_flops(before: Size, stage: StagePlan, spec: ModelSpec) -> float:
    """What it takes to bring the picture of the stage before to this stage's canvas: decoding and encoding, or nothing."""
    if stage.enlarger in (None, "latent"):
        return 0.0
    small, large = before.divided(spec.cell_px), stage.grid.canvas
    decode = cost.vae_decode_flops(spec.vae, small.height, small.width)
    return decode + cost.vae_encode_flops(spec.vae, large.height, large.width)


def decode_plans(canvas: Size, spec: ModelSpec, device: DeviceSpec) -> Iterator[DecodePlan]:
    """Every way to run the autoencoder at that size, from fast to small. Host memory is no other place for a CPU."""
    names = VAE_POLICIES[:-1] if device.kind == "cpu" else VAE_POLICIES
    cells = canvas.divided(spec.cell_px)
    for name in (name for name in names if cost.indexable(spec.vae, cells, name)):
        yield DecodePlan(policy=name, band_rows=0 if name == "whole" else cost.BAND_ROWS[0], dtype=decode_dtype(device))
    for rows in cost.BAND_ROWS[1:]:
        yield DecodePlan(policy=names[-1], band_rows=rows, dtype=decode_dtype(device))


def choose_decode(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str) -> tuple[DecodePlan, str]:
    """The fastest way to decode, and to encode between stages, within the budget."""
    canvas = stages[-1].canvas
    for decode in decode_plans(canvas, spec, device):
        peak = decode_cost(canvas, decode, spec, device, dtype).peak_bytes
        if peak <= device.budget_bytes:
            same = "" if decode.policy == "whole" else "; the pixels of the whole decode, to rounding"
            return decode, f"decode {decode}: peak {gib(peak)}{same}"
    raise too_small(stages, spec, device, dtype)


def decode_cost(canvas: Size, decode: DecodePlan, spec: ModelSpec, device: DeviceSpec, dtype: str) -> StageCost:
    """Peak bytes of decoding and of encoding, whichever is more; FLOPs and seconds of decoding."""
    cells = canvas.divided(spec.cell_px)
    element, cpu = BYTES_PER_ELEMENT[decode.dtype], device.kind == "cpu"
    ways = [
        cost.vae_policy(spec.vae, cells, element, decode.policy, decode.band_rows, cpu=cpu, encode=encode)
        for encode in (False, True)
    ]
    picture = 4 * 3 * canvas.area // 4 if cpu else 0  # the picture of the stage before, float32, while it is enlarged
    weights = 0 if cpu else resident_bytes(spec, dtype, decode.dtype)
    peak = weights + picture + max(way.peak_bytes for way in ways)
    return StageCost(stage="decode", peak_bytes=peak, flops=ways[0].flops, seconds=ways[0].flops / device.flops)


def make_ladder(
    canvas: Size, batch: int, decode: DecodePlan, spec: ModelSpec, device: DeviceSpec, dtype: str
) -> Iterator[Rung]:
    """What is done after running out of memory, cheapest change first; every rung is a complete setting."""
    while batch > 1:
        batch //= 2
        yield Rung(stage="denoise", batch=batch, decode=decode, exact=True, peak_bytes=None, reason=f"tile batch {batch}")
    plans = list(decode_plans(canvas, spec, device))
    for less in plans[plans.index(decode) + 1 :]:
        peak = decode_cost(canvas, less, spec, device, dtype).peak_bytes
        yield Rung(stage="decode", batch=1, decode=less, exact=True, peak_bytes=peak, reason=f"decode {less}")


def tiny_rung(request: RenderRequest, decode: DecodePlan) -> Iterator[Rung]:
    """The last resort, only where it was asked for: another autoencoder, so another picture."""
    if request.tiny_vae is not None:
        less = replace(decode, policy="tiny", band_rows=0)
        reason = f"approximation: decode with {request.tiny_vae}, as asked for"
        yield Rung(stage="decode", batch=1, decode=less, exact=False, peak_bytes=None, reason=reason)
