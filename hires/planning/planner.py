"""From a request, a model and a device to a plan: every choice is made here, before the first kernel, with its reason.

Pure functions of shapes, no torch. First version: it walks candidates from fast to small and takes the first that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hires.checkpoints.spec import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.kernels.attention_policies import Global
from hires.options.render import RenderRequest
from hires.options.sizes import check_size
from hires.options.stage import WindowSpec
from hires.planning.costs import network_memory
from hires.planning.costs.stages import choose_dtype, choose_text, stage_cost
from hires.planning.explain import (
    colour_note,
    guidance_notes,
    noted,
    policy_notes,
    relay_note,
    sampler_notes,
    tile_notes,
    way_notes,
)
from hires.planning.plan import MemoryPlan, StagePlan
from hires.planning.presets import preset
from hires.planning.resolution import bins_of
from hires.planning.search import make_ladder, offloads, search, tiny_rung
from hires.planning.stages import check_steps, choose_strategy, make_stages, said
from hires.planning.tiles import choose_tile, in_tiles
from hires.tiling.geometry import snap
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
    extra = (
        network_memory.preview_bytes(4 if device.kind == "cpu" else 2, device.kind == "cpu")
        if request.tiny_vae is not None
        else 0
    )
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
