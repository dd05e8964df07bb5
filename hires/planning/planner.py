"""Plans a render in four passes: describe, cost, search, explain.

Imports no torch.

Every choice is made here, before the first kernel, by pure functions of shapes; no pass asks an earlier one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hires.checkpoints.model import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.options.render import RenderRequest
from hires.planning.costs.stages import CostModel
from hires.planning.describe import describe
from hires.planning.draft import Draft
from hires.planning.explain import approximated, approximation, explain
from hires.planning.plan import MemoryPlan, StageCost
from hires.planning.search import BATCHES, CPU_BATCHES, Way, search

PICTURES_TOGETHER = 8
"""The most pictures that share batches: the first of them waits for all."""
CHOSEN_WEIGHTS = ("int8", "nf4")
"""What an approximation may keep weights in, the more exact first."""
TILED = {"direct": "tiled"}  # a canvas in one piece has no tiles that could be smaller


def plan(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> MemoryPlan:
    """Choose canvas, strategy, stages, tiles, batch, dtype and decode policy for the device's budget.

    A CPU's default budget grows if nothing fits it, and approximations are tried if the request allows them. RequestError for
    values that contradict each other; BudgetError, with the smallest budget that would do, if nothing fits.
    """
    try:
        return plan_exactly(request, spec, device)
    except BudgetError as error:
        refusal = error
    for cheaper in approximations(request, spec):
        try:
            way = plan_exactly(cheaper, spec, device)
        except BudgetError:
            continue
        if not request.allow_approximate:
            raise BudgetError(f"{refusal}, or another picture {approximation(request, cheaper)}: `allow_approximate`")
        return approximated(way, request, cheaper)
    raise refusal


def approximations(request: RenderRequest, spec: ModelSpec) -> Iterator[RenderRequest]:
    """Cheaper pictures in the order they are tried.

    First weights in 8 and in 4 bits, which change the picture least; then smaller tiles; then both.
    """
    packings = CHOSEN_WEIGHTS if request.weights is None else ()
    for weights in packings:
        yield replace(request, weights=weights)
    tiles = list(smaller_tiles(request, spec))
    yield from tiles
    for weights in packings:
        yield from (replace(each, weights=weights) for each in tiles)


def smaller_tiles(request: RenderRequest, spec: ModelSpec) -> Iterator[RenderRequest]:
    """First tiles for a canvas in one piece, then tiles of half the side, down to a quarter of the trained size."""
    following = next(_tiled(request, spec), None)
    while following is not None:
        yield following
        following = next(_tiled(following, spec), None)


def _tiled(request: RenderRequest, spec: ModelSpec) -> Iterator[RenderRequest]:
    if request.attention_policy is not None and request.attention_policy != "global":
        yield replace(request, attention_policy="global")
        return
    if any(stage.attention for stage in (request.relay, *request.stages)):
        relay = replace(request.relay, attention=None)
        stages = tuple(replace(stage, attention=None) for stage in request.stages)
        yield replace(request, attention_policy="global", relay=relay, stages=stages)
        return
    tile = request.tile_px or spec.defaults.tile_px
    if tile // 2 >= spec.native_px // 4:
        yield replace(request, tile_px=tile // 2, overlap_px=tile // 8, strategy=TILED.get(request.strategy, request.strategy))


def plan_exactly(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> MemoryPlan:
    """The plan of the picture as requested. BudgetError if it fits no way to run it."""
    draft = describe(request, spec, device)
    try:
        way = search(draft, CostModel(spec, device, draft.dtype.value, request.weights))
    except BudgetError:
        larger = free_budget(CostModel(spec, device, "fp32", request.weights))
        if larger is None:
            raise
        way = search(draft, CostModel(spec, larger, draft.dtype.value, request.weights))
    return complete(draft, way)


def free_budget(costs: CostModel) -> DeviceSpec | None:
    """A CPU with all its free memory, less the weights, as its budget; None if that is no more than it has."""
    device = costs.device
    free = device.most_bytes - costs.network_bytes - costs.vae_bytes
    return replace(device, budget_bytes=free, most_bytes=0) if free > device.budget_bytes else None


def complete(draft: Draft, way: Way) -> MemoryPlan:
    """What is drawn and how it runs, as one plan with its notes."""
    request, best = draft.request, way.best
    return MemoryPlan(
        model=draft.spec.name,
        output=request.size,
        canvas=draft.canvas.value,
        strategy=draft.strategy.value,
        stages=best.stages,
        decode=best.decode,
        batch=max(stage.batch for stage in best.stages),
        dtype=draft.dtype.value,
        device=way.device.name,
        budget_bytes=way.device.budget_bytes,
        offload=best.offload,
        backends=(),
        costs=costs_of(draft, way),
        ladder=way.ladder,
        notes=tuple(explain(draft, way)),
        alternatives=way.alternatives,
        text_on_host=way.text.on_host,
        text_dtype=way.text.dtype,
        weights=request.weights,
        weight_bytes=way.weight_bytes,
        preset=request.preset,
        colour_fix=request.colour_fix,
    )


def costs_of(draft: Draft, way: Way) -> tuple[StageCost, ...]:
    """The costs of a way; "adain" decodes twice, as it needs the whole picture's moments before its first row."""
    *stages, decode, text = way.costs
    if draft.request.colour_fix == "adain":
        decode = replace(decode, flops=2 * decode.flops, seconds=2 * decode.seconds)
    return (*stages, decode, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Pictures that share the batches of their first stage."""

    pictures: int
    """How many; 1 where sharing saves nothing or has no room."""
    batch: int
    """Images (pictures times conditions) evaluated at once."""
    peak_bytes: int
    """Predicted, weights included."""


def pictures_together(plan: MemoryPlan, spec: ModelSpec, device: DeviceSpec) -> Together:
    """How many pictures share the batches of a plan's first stage: the largest batch within the device's budget.

    Where the host's memory is limited, within the peak that the plan has anyway.
    """
    stage, costs = plan.stages[0], CostModel(spec, device, plan.dtype, plan.weights)
    each = costs.most_images(stage)
    room = plan.peak_bytes if device.ram_bytes else max(plan.peak_bytes, int(device.budget_bytes / (1 + device.slack)))
    for batch in CPU_BATCHES if costs.on_cpu else BATCHES:
        pictures = min(batch // each, PICTURES_TOGETHER)
        if pictures > 1 and (peak := costs.together(stage, pictures, pictures * each, plan.offload)) <= room:
            return Together(pictures=pictures, batch=pictures * each, peak_bytes=peak)
    return Together(pictures=1, batch=stage.batch, peak_bytes=plan.peak_bytes)
