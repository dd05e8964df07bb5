"""From a request, a model and a device to a plan: every choice is made here, before the first kernel, with its reason.

Pure functions of shapes, no torch. First version: it walks candidates from fast to small and takes the first that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hires import cost
from hires.checkpoints.spec import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.kernels.attention_policies import Global
from hires.options.render import RenderRequest
from hires.options.sizes import check_size
from hires.options.stage import WindowSpec
from hires.placement import choose_tile, in_tiles, policy_notes
from hires.presets import preset
from hires.resolution import bins_of, relay_note
from hires.search import WHERE, Way, make_ladder, offloads, search, tiny_rung
from hires.stage_cost import choose_dtype, choose_text, stage_cost
from hires.stages import check_steps, choose_strategy, guidance_notes, make_stages, said, sampler_notes
from hires.tiling.geometry import snap
from hires.types import MemoryPlan, StagePlan
from hires.units import gib


def plan(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> MemoryPlan:
    """Choose canvas, strategy, stages, tiles, batch, dtype and decode tiles for the device's budget.

    A CPU's budget that nobody gave grows where nothing fits it. RequestError for values that contradict each other;
    BudgetError, with the smallest budget that would do, where nothing fits.
    """
    try:
        return _within(request, spec, device)
    except BudgetError:
        cheaper = next(approximations(request, spec), None)
        if cheaper is None:
            raise
    return noted(plan(cheaper, spec, device), cheaper)


def approximations(request: RenderRequest, spec: ModelSpec) -> Iterator[RenderRequest]:
    """Requests for cheaper pictures, each another than the one before, where the user allows it: tiles for a canvas in one
    piece, then tiles of half the side, down to a quarter of the trained size."""
    if not request.allow_approximate:
        return
    if request.attention_policy is not None and request.attention_policy != "global":
        yield replace(request, attention_policy="global")
        return
    if any(stage.attention for stage in (request.relay, *request.stages)):
        unsaid = (replace(stage, attention=None) for stage in request.stages)
        yield replace(request, attention_policy="global", relay=replace(request.relay, attention=None), stages=tuple(unsaid))
        return
    tile = request.tile_px or spec.defaults.tile_px
    if tile // 2 >= spec.native_px // 4:
        yield replace(request, tile_px=tile // 2, overlap_px=tile // 8, strategy=TILED.get(request.strategy, request.strategy))


TILED = {"direct": "tiled"}  # a canvas in one piece has no tiles that could be smaller


def noted(made: MemoryPlan, request: RenderRequest) -> MemoryPlan:
    """The plan of an approximation, with its name."""
    what = "tiles instead of the canvas in one piece" if request.tile_px is None else f"tiles of {request.tile_px} px"
    note = f"approximation: {what}, because nothing exact has room and --allow-approximate was given"
    return made if any(n.startswith("approximation: tiles") for n in made.notes) else replace(made, notes=(*made.notes, note))


def _within(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> MemoryPlan:
    """The plan of just that picture."""
    try:
        return _plan(request, spec, device)
    except BudgetError:
        weights = 4 * (spec.network_params + spec.vae_params)
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
    chosen = [*sampler_notes(request, stages, spec), *guidance_notes(request, spec)]
    check_steps(stages, spec)
    stages, cut = with_room(stages, request, spec, replace(device, budget_bytes=roomy_bytes(device)), dtype)
    notes += cut
    notes.append(relay_note(tuple(stage.canvas for stage in stages), bins_of(spec)))
    if request.sigma_max is not None:
        notes.append(
            f"starts from sigma {stages[0].sigma_start:g} instead of the checkpoint's {spec.sigma_max:g}: "
            + ("what goes with the size" if request.sigma_max == "auto" else "as asked for")
        )
    notes += policy_notes(request, stages, spec)
    notes += tile_notes(request, stages, spec, (tile, overlap))
    text = choose_text(spec, device, dtype)
    notes += text.notes
    notes += chosen
    extra = cost.preview_bytes(4 if device.kind == "cpu" else 2, device.kind == "cpu") if request.tiny_vae is not None else 0
    way, alternatives = search(stages, spec, replace(device, budget_bytes=device.budget_bytes - extra), dtype)
    costs = [replace(made, peak_bytes=made.peak_bytes + extra) for made in way.costs[:-1]] + [way.costs[-1], text.cost]
    if extra:
        notes.append(f"previews by {request.tiny_vae}: up to {gib(extra)} after each step")
    notes += way_notes(way, device, dtype)
    if request.colour_fix is not None:
        notes.append(colour_note(request, stages))
        if request.colour_fix == "adain":  # needs the whole picture's moments before its first row
            costs[-2] = replace(costs[-2], flops=2 * costs[-2].flops, seconds=2 * costs[-2].seconds)
    return MemoryPlan(
        model=spec.name,
        output=request.size,
        canvas=canvas,
        strategy=strategy,
        stages=way.stages,
        decode=way.decode,
        batch=max(stage.batch for stage in way.stages),
        dtype=dtype,
        device=device.name,
        budget_bytes=device.budget_bytes,
        offload=way.offload,
        backends=(),
        costs=tuple(costs),
        ladder=(*make_ladder(way, spec, device, dtype), *tiny_rung(request, way.decode)),
        notes=tuple(notes),
        alternatives=alternatives,
        text_on_host=text.on_host,
        text_dtype=text.dtype,
        preset=request.preset,
        colour_fix=request.colour_fix,
    )


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


def roomy_bytes(device: DeviceSpec) -> int:
    """What stages may take of a budget, the allocator's slack apart."""
    return int(max(device.budget_bytes, device.most_bytes) / (1 + device.slack))


def with_room(
    stages: tuple[StagePlan, ...], request: RenderRequest, spec: ModelSpec, device: DeviceSpec, dtype: str
) -> tuple[tuple[StagePlan, ...], list[str]]:
    """The stages, those in tiles whose canvas in one piece has no room and was the preset's choice, and a note on each.

    A budget that is larger draws them in one piece: another picture, so the note says it.
    """
    made, found, notes = preset(request.preset, spec), [], []
    tiles = choose_tile(request, stages[-1].canvas, spec, "progressive")
    for index, stage in enumerate(stages):
        told, _ = said(request, made, spec, index)
        asked = request.attention_policy or told.attention
        least = min(stage_cost(stage, spec, device, 1, dtype, way).peak_bytes for way in offloads(device))
        if stage.attention == Global() or asked or least <= device.budget_bytes:
            found.append(stage)
            continue
        found.append(in_tiles(replace(stage, shift_cells=0), WindowSpec(), spec, tiles))
        notes.append(
            f"approximation: {stage.name} in tiles instead of one piece, which needs {gib(least)} of "
            f"{gib(device.budget_bytes)}; a larger budget draws another picture (--attention-policy global: tiles on any)"
        )
    return tuple(found), notes


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
