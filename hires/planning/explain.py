"""Fourth pass: writes a plan's notes, each choice with its numbers.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hires.checkpoints.model import embeds_guidance
from hires.kernels.attention_policies import NPA, Global, KVPool, Policy, Windows
from hires.options.render import RenderRequest
from hires.options.stage import parse_policy
from hires.planning.costs.weights import VAE_STORAGE
from hires.planning.draft import Draft
from hires.planning.plan import WHERE, MemoryPlan, StagePlan
from hires.planning.search import Way
from hires.sampling import registry
from hires.tiling.geometry import Size, relay_view
from hires.units import gib


def explain(draft: Draft, way: Way) -> Iterator[str]:
    """The notes of a plan, from what is drawn to how it runs."""
    stages = way.best.stages
    yield from draft.spec.notes
    yield from choice_notes(draft)
    yield from weight_notes(draft, way)
    yield from untiled_notes(way)
    yield relay_note(tuple(stage.canvas for stage in stages), draft.bins)
    yield from sigma_notes(draft, stages)
    yield from policy_notes(draft, stages)
    yield from tile_notes(draft, stages)
    yield from text_notes(way)
    yield from sampler_notes(draft, stages)
    yield from few_step_notes(draft, stages[0])
    yield from guidance_notes(draft)
    yield from way_notes(draft, way)
    yield from colour_notes(draft, stages)
    yield from budget_notes(draft, way)


BY_ITSELF = "because nothing exact has room and `allow_approximate` was given"


def approximated(plan: MemoryPlan, request: RenderRequest, cheaper: RenderRequest) -> MemoryPlan:
    """The plan of an approximation, named as one in its notes. cheaper: the request that was planned instead."""
    if cheaper.weights != request.weights:
        told = (note.removesuffix(AS_ASKED) + BY_ITSELF if note.startswith(PACKED) else note for note in plan.notes)
        plan = replace(plan, notes=tuple(told))
    return plan if replace(cheaper, weights=request.weights) == request else in_smaller_tiles(plan, cheaper)


def approximation(request: RenderRequest, cheaper: RenderRequest) -> str:
    """What an approximation changes, in words."""
    changes = [] if cheaper.weights == request.weights else [f"with `weights` {cheaper.weights}"]
    if replace(cheaper, weights=request.weights) != request:
        changes.append("in tiles" if cheaper.tile_px is None else f"in tiles of {cheaper.tile_px} px")
    return " ".join(changes)


def in_smaller_tiles(plan: MemoryPlan, request: RenderRequest) -> MemoryPlan:
    """The plan of a picture in tiles that were not asked for, named as an approximation in its notes."""
    if any(note.startswith("approximation: tiles") for note in plan.notes):
        return plan
    what = "tiles instead of the canvas in one piece" if request.tile_px is None else f"tiles of {request.tile_px} px"
    return replace(plan, notes=(*plan.notes, f"approximation: {what}, {BY_ITSELF}"))


PACKED, AS_ASKED = "approximation: weights of the network in ", "as asked for"
BITS = {"fp8": "8 bits (fp8)", "int8": "8 bits (int8)", "nf4": "4 bits (NF4)"}


def weight_notes(draft: Draft, way: Way) -> Iterator[str]:
    """Weights that are kept in fewer bits than they are computed in."""
    weights = draft.request.weights
    if weights is not None:
        of_vae = BITS[VAE_STORAGE]
        yield (
            f"{PACKED}{BITS[weights]}, of the VAE in {of_vae}: {gib(way.weight_bytes)}, widened layer by layer to compute; "
            f"{AS_ASKED}"
        )


def choice_notes(draft: Draft) -> Iterator[str]:
    """Canvas, strategy and number type."""
    if draft.canvas.reason:
        yield f"canvas {draft.canvas.value} is {draft.canvas.reason}"
    yield f"strategy {draft.strategy.value}: {draft.strategy.reason}"
    yield f"dtype {draft.dtype.value}: {draft.dtype.reason}"


def untiled_notes(way: Way) -> Iterator[str]:
    """Stages in tiles that the preset wants in one piece: a larger budget draws another picture, so the note says it."""
    room = int(max(way.device.budget_bytes, way.device.most_bytes) / (1 + way.device.slack))
    for name, needed in way.untiled_bytes:
        yield (
            f"approximation: {name} in tiles instead of one piece, which needs {gib(needed)} of "
            f"{gib(room)}; a larger budget draws another picture (`attention_policy` global: tiles on any)"
        )


def sigma_notes(draft: Draft, stages: Sequence[StagePlan]) -> Iterator[str]:
    """A noise level to start from other than the checkpoint's."""
    if draft.request.sigma_max is not None:
        why = "what goes with the size" if draft.request.sigma_max == "auto" else "as asked for"
        yield f"starts from sigma {stages[0].sigma_start:g} instead of the checkpoint's {draft.spec.sigma_max:g}: {why}"


def policy_notes(draft: Draft, stages: Sequence[StagePlan]) -> Iterator[str]:
    """Every approximation of attention, and a policy that was asked for and changes nothing."""
    request = draft.request
    given = parse_policy(request.attention_policy).name != "global"
    used = [stage for stage in stages if stage.attention != Global()]
    if not used:
        if given:
            yield f"attention {request.attention_policy} changes nothing: {stages[-1].canvas} is within the trained size"
        return
    by_user = given or request.stages or request.relay.attention
    why = "as asked for" if by_user else f"as preset {request.preset} has it"
    names, reach = ", ".join(stage.name for stage in used), policy_words(used[-1].attention, draft.spec.cell_px)
    yield f"approximation: self-attention {reach}, {why} ({names})"


def policy_words(policy: Policy, cell_px: int) -> str:
    """What each token attends to."""
    if isinstance(policy, NPA | Windows):
        kind = "neighbourhood" if isinstance(policy, NPA) else "window"
        return f"attends to a {kind} of {policy.window * cell_px} px over the whole canvas"
    if isinstance(policy, KVPool):
        return f"attends to keys averaged {policy.r} x {policy.r} over the whole canvas"
    return "attends to the whole canvas, its scores scaled for the greater length"


def tile_notes(draft: Draft, stages: Sequence[StagePlan]) -> Iterator[str]:
    """Where tiles and their weights come from."""
    request, spec = draft.request, draft.spec
    if all(stage.grid.count == 1 for stage in stages):
        yield "no latent tiling: one tile covers the canvas"
        return
    tile_px, overlap_px = (cells * spec.cell_px for cells in draft.tile_cells)
    if any(stage.windows for stage in (request.relay, *request.stages)):
        side, blend = stages[-1].grid.tile.width * spec.cell_px, stages[-1].blend
        moving = ", moved at every step" if stages[-1].shift_cells else ""
        yield f"tiles of {side} px in the last stage, {blend} weights{moving}: as asked for"
    elif request.tile_px:
        rounded = f"tile_px {request.tile_px} rounded up to {spec.align_px} px"
        yield f"tiles of {tile_px} px, {overlap_px} px shared: {'as asked for' if request.tile_px == tile_px else rounded}"
    else:
        yield f"tiles of {tile_px} px, {overlap_px} px shared: what the model was trained at"


def text_notes(way: Way) -> Iterator[str]:
    """Text encoders that have no room on the card, and those that take much host memory."""
    text = way.text
    if text.on_host:
        yield f"text encoders run on the CPU: they need {gib(text.weight_bytes)} of {gib(way.device.budget_bytes)}"
    if text.host_bytes:
        size = gib(text.host_bytes)
        yield f"text encoders in {text.dtype}: {size} of host memory while the prompts are encoded, then freed"


def sampler_notes(draft: Draft, stages: Sequence[StagePlan]) -> Iterator[str]:
    """Sampler and schedule, and samplers of later stages that differ."""
    request, sampler, schedule = draft.request, draft.sampler, draft.schedule
    yield f"sampler {sampler.value}: {sampler.reason}; schedule {schedule.value}: {schedule.reason}"
    by = "as asked for" if request.relay.sampler or request.stages else "the model's own"
    for name in dict.fromkeys(stage.sampler for stage in stages if stage.enlarger):
        if name != sampler.value:
            yield f"refined by {name}: {by}"
    if not registry.SAMPLER_FACTS[sampler.value].known:
        yield (
            f"{sampler.value} takes as many evaluations as its tolerance asks for, whatever `steps` says: "
            f"{registry.ADAPTIVE_EVALUATIONS} per stage are an estimate"
        )


def few_step_notes(draft: Draft, base: StagePlan) -> Iterator[str]:
    """What was asked for that a distilled model was not made for, and a few-step sampler on a model that is not distilled."""
    spec, own = draft.spec, draft.spec.defaults
    if spec.facts.few_step is None:
        if base.sampler in ("lcm", "tcd") and own.sampler != base.sampler:
            yield f"sampler {base.sampler} is made for few-step models and draws new noise at every step; {spec.name} is none"
        return
    if (base.sampler, base.schedule) != (own.sampler, own.schedule):
        yield (
            f"{base.sampler} on {base.schedule}, as asked for: this few-step model was distilled for {own.sampler} on "
            f"{own.schedule}; expect another picture"
        )
    profile = spec.profile
    if profile is None:
        return
    if profile.own_steps and base.steps not in profile.own_steps:
        least, most = min(profile.own_steps), max(profile.own_steps)
        known = f"{least}" if least == most else f"{least} to {most}"
        yield f"{base.steps} steps, as asked for: {profile.title} is made for {known}; expect a worse picture"
    if base.guidance > profile.guidance_up_to:
        yield (
            f"guidance {base.guidance:g}, as asked for: {profile.title} is made for {profile.guidance_up_to:g} at most; expect "
            f"burnt colours"
        )


def guidance_notes(draft: Draft) -> Iterator[str]:
    """Guidance that does not mean what it seems to, and a negative prompt that is not used."""
    request, guidance = draft.request, draft.guidance
    if request.guidance is not None and guidance.reason:
        yield f"guidance {request.guidance:g} taken as {guidance.value:g}: {guidance.reason}"
    elif guidance.value < 1:
        yield f"guidance {guidance.value:g}: below 1 the picture leans to the negative prompt"
    if request.negative and embeds_guidance(draft.spec):
        yield "the negative prompt has no say: this LCM is told the guidance scale instead"
    elif request.negative and guidance.value == 1.0:
        yield "the negative prompt has no say at guidance 1"
    if request.guidance_rescale:
        none = "; guidance 1 has nothing to rescale" if guidance.value == 1.0 else ""
        yield f"guidance rescaled by {request.guidance_rescale:g}: as asked for{none}"


def way_notes(draft: Draft, way: Way) -> Iterator[str]:
    """Previews, batch, place of the weights and decoding, with the bytes that decided them."""
    best, device = way.best, way.device
    if way.preview_bytes:
        yield f"previews by {draft.request.tiny_vae}: up to {gib(way.preview_bytes)} after each step"
    peak, batch = max(cost.peak_bytes for cost in best.costs), max(stage.batch for stage in best.stages)
    pictures = f"{batch} picture{'s' if batch > 1 else ''} at once"
    yield f"{pictures}: the fastest that fits, peak {gib(peak)} of {gib(device.budget_bytes)}"
    if device.kind != "cpu":
        yield f"weights {WHERE[best.offload]}, text encoders freed after use"
    same = "" if best.decode.policy == "whole" else "; the pixels of the whole decode, to rounding"
    yield f"decode {best.decode}: peak {gib(best.costs[-1].peak_bytes)}{same}"
    if best.decode.dtype != draft.dtype.value:
        yield f"decode in {best.decode.dtype}: an SDXL-type VAE overflows in fp16, and bf16 is enough for 8 bits"


def colour_notes(draft: Draft, stages: Sequence[StagePlan]) -> Iterator[str]:
    """What the colour fix does, and to which picture's colours."""
    fix, from_init = draft.request.colour_fix, draft.request.strength is not None
    if fix is None:
        return
    if not from_init and len(stages) == 1:
        yield f"colour fix {fix} changes nothing: there is no picture that this one started from"
        return
    source = "the picture it starts from" if from_init else "its base picture"
    how = {"wavelet": "coarse colours", "adain": "mean and deviation of every colour (decoded twice)"}
    yield f"colour fix {fix}: {how[fix]} of {source}"


def budget_notes(draft: Draft, way: Way) -> Iterator[str]:
    """A default budget that had to grow."""
    given, used = draft.device.budget_bytes, way.device.budget_bytes
    if used != given:
        yield f"budget {gib(used)}, of free memory less the weights: {gib(given)} is too small"


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
