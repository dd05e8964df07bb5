"""Notes of a plan: every choice in words, with the numbers that decided it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hires.checkpoints.spec import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.kernels.attention_policies import NPA, Global, KVPool, Windows
from hires.options.render import RenderRequest
from hires.options.stage import parse_policy
from hires.planning.plan import MemoryPlan, StagePlan
from hires.planning.search import WHERE, Way
from hires.planning.stages import choose_guidance, choose_sampler
from hires.sampling import registry
from hires.tiling.geometry import Size, relay_view
from hires.units import gib


def policy_notes(request: RenderRequest, stages: Sequence[StagePlan], spec: ModelSpec) -> Iterator[str]:
    """Every approximation of attention is named, and a policy that was asked for and changes nothing."""
    asked = parse_policy(request.attention_policy).name != "global"
    used = [stage for stage in stages if stage.attention != Global()]
    if not used:
        if asked:
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
    why = "as asked for" if asked or request.stages or request.relay.attention else f"as preset {request.preset} has it"
    yield f"approximation: self-attention {what}, {why} ({', '.join(stage.name for stage in used)})"


def noted(made: MemoryPlan, request: RenderRequest) -> MemoryPlan:
    """The plan of an approximation, with its name."""
    what = "tiles instead of the canvas in one piece" if request.tile_px is None else f"tiles of {request.tile_px} px"
    note = f"approximation: {what}, because nothing exact has room and --allow-approximate was given"
    return made if any(n.startswith("approximation: tiles") for n in made.notes) else replace(made, notes=(*made.notes, note))


def tile_notes(request: RenderRequest, stages: tuple[StagePlan, ...], spec: ModelSpec, tiles: tuple[int, int]) -> Iterator[str]:
    """Where tiles and their weights come from."""
    if all(stage.grid.count == 1 for stage in stages):
        yield "no latent tiling: one tile covers the canvas"
        return
    told = [stage.windows for stage in (request.relay, *request.stages) if stage.windows]
    tile_px, overlap_px = (cells * spec.cell_px for cells in tiles)
    if told:
        side, blend = stages[-1].grid.tile.width * spec.cell_px, stages[-1].blend
        moving = ", moved at every step" if stages[-1].shift_cells else ""
        yield f"tiles of {side} px in the last stage, {blend} weights{moving}: as asked for"
    elif request.tile_px:
        rounded = f"--tile {request.tile_px} rounded up to {spec.align_px} px"
        yield f"tiles of {tile_px} px, {overlap_px} px shared: {'as asked for' if request.tile_px == tile_px else rounded}"
    else:
        yield f"tiles of {tile_px} px, {overlap_px} px shared: what the model was trained at"


def colour_note(request: RenderRequest, stages: tuple[StagePlan, ...]) -> str:
    """What the colour fix does, and to what."""
    if request.strength is None and len(stages) == 1:
        return f"colour fix {request.colour_fix} changes nothing: there is no picture that this one started from"
    source = "the picture it starts from" if request.strength is not None else "its base picture"
    how = {"wavelet": "coarse colours", "adain": "mean and deviation of every colour (decoded twice)"}
    return f"colour fix {request.colour_fix}: {how[request.colour_fix or 'wavelet']} of {source}"


def way_notes(way: Way, device: DeviceSpec, dtype: str) -> Iterator[str]:
    """How it is run, with the numbers that decided it."""
    peak, batch = max(cost.peak_bytes for cost in way.costs), max(stage.batch for stage in way.stages)
    pictures = f"{batch} picture{'s' if batch > 1 else ''} at once"
    yield f"{pictures}: the fastest that fits, peak {gib(peak)} of {gib(device.budget_bytes)}"
    if device.kind != "cpu":
        yield f"weights {WHERE[way.offload]}, text encoders freed after use"
    same = "" if way.decode.policy == "whole" else "; the pixels of the whole decode, to rounding"
    yield f"decode {way.decode}: peak {gib(way.costs[-1].peak_bytes)}{same}"
    if way.decode.dtype != dtype:
        yield f"decode in {way.decode.dtype}: an SDXL-type VAE overflows in fp16, and bf16 is enough for 8 bits"


def relay_note(canvases: tuple[Size, ...], bins: tuple[Size, ...]) -> str:
    """What is rendered, in which bin (height / width), and by how much it is enlarged on the way to the last canvas."""
    base, canvas = canvases[0], canvases[-1]
    if base == canvas:
        return f"base picture {base} is the canvas itself; nothing is enlarged"
    named = f"bin {base.height / base.width:.2f}" if base in bins else "narrower than any bin, of the area of the nearest"
    resized, _ = relay_view(base, canvas)
    down, across = resized.height / base.height, resized.width / base.width
    factor = f"{down:.2f}x" if abs(down - across) < 0.005 else f"{down:.2f}x in height and {across:.2f}x in width"
    cut = "" if resized == canvas else f", {1 - canvas.area / resized.area:.0%} of it cut away"
    count = f"{len(canvases) - 1} stage{'s' if len(canvases) > 2 else ''}"
    return f"base picture {base} ({named}), enlarged {factor} to the canvas {canvas}, refined in {count}{cut}"


def guidance_notes(request: RenderRequest, spec: ModelSpec) -> Iterator[str]:
    guidance = choose_guidance(request, spec)
    if request.guidance is not None and guidance != request.guidance:
        yield f"guidance {request.guidance:g} taken as 1: none, as this few-step model's card means it"
    elif guidance < 1:
        yield f"guidance {guidance:g}: below 1 the picture leans to the negative prompt"
    if guidance == 1.0 and request.negative:
        yield "the negative prompt has no say at guidance 1"


def sampler_notes(request: RenderRequest, stages: Sequence[StagePlan], spec: ModelSpec) -> Iterator[str]:
    """What was chosen and why; RequestError for a sampler and a schedule that do not fit the model or each other."""
    sampler, schedule, why = choose_sampler(request, spec)
    for stage in stages:
        registry.check_combination(
            stage.sampler,
            stage.schedule,
            spec.parameterisation,
            moving_tiles=stage.shift_cells > 0,
            few_step=spec.facts.few_step,
            steps=stage.steps,
        )
    chosen = "as asked for" if request.sampler else "the model's own"
    yield f"sampler {sampler}: {chosen}; schedule {schedule}: {why}"
    by = "as asked for" if request.relay.sampler or request.stages else "the model's own"
    yield from (
        f"refined by {name}: {by}" for name in dict.fromkeys(s.sampler for s in stages if s.enlarger) if name != sampler
    )
    if not registry.SAMPLERS[sampler].known:
        yield (
            f"{sampler} takes as many evaluations as its tolerance asks for, whatever --steps says: "
            f"{registry.ADAPTIVE_EVALUATIONS} per stage are an estimate"
        )
