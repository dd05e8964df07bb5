"""How it is run: batches, the autoencoder's policy and where weights are kept, the fastest of all ways within the budget.

The budget decides how, never what: every way draws the same picture. Where weights are kept is tried as a whole; within it
stages do not depend on each other, so the best of each is the best of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hires.checkpoints.spec import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.kernels.attention_policies import Global
from hires.options.render import RenderRequest
from hires.planning.costs.evaluations import estimates_per_step
from hires.planning.costs.stages import decode_cost, decode_plans, enlarge_cost, host_bytes, moving_seconds, stage_cost
from hires.planning.plan import DecodePlan, Rung, StageCost, StagePlan
from hires.units import gib

BATCHES = (32, 16, 8, 4, 2, 1)
CPU_BATCHES = (8, 4, 2, 1)  # a tile of the shipped model takes less in 8 than in 4 on two cores, in 16 no less
CPU_FRAGMENTS = 1.25  # resident over requested: pages that the allocator holds between blocks in use
OFFLOADS = ("none", "components", "layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A complete way to run some stages: the stages with their batches, and what each of them and the decode takes."""

    offload: str
    stages: tuple[StagePlan, ...]
    decode: DecodePlan
    costs: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)


def search(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str) -> tuple[Way, tuple[str, ...]]:
    """The fastest way within the budget, and what else was considered. BudgetError where nothing fits."""
    device = replace(device, budget_bytes=int(device.budget_bytes / (1 + device.slack)))
    found, others = [], []
    for offload in offloads(device):
        try:
            found.append(fastest(stages, spec, device, dtype, offload))
            others.append(f"weights {WHERE[offload]}: about {found[-1].seconds:.0f} s")
        except BudgetError as error:
            others.append(f"weights {WHERE[offload]}: {error}")
    if not found:
        raise too_small(stages, spec, device, dtype)
    best = min(found, key=lambda way: way.seconds)
    return best, tuple(others) if device.kind != "cpu" else ()


WHERE = {
    "none": "stay on the device",
    "components": "of one part at a time on the device",
    "layers": "in host memory, fetched layer by layer",
}


def offloads(device: DeviceSpec) -> tuple[str, ...]:
    return OFFLOADS[:1] if device.kind == "cpu" else OFFLOADS


def fastest(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str, offload: str) -> Way:
    """The fastest way with the weights kept so. BudgetError names the stage that does not fit."""
    least_host = host_bytes(stages, spec, device, dtype, offload)
    if device.ram_bytes and least_host > device.ram_bytes:
        raise BudgetError(f"needs {gib(least_host)} of host memory, --ram allows {gib(device.ram_bytes)}")
    device = within_ram(device, least_host)
    decode, decoding = choose_decode(stages, spec, device, dtype, offload)
    chosen, costs = [], []
    for index, stage in enumerate(stages):
        batch, cost = choose_batch(stage, spec, device, dtype, offload)
        if index:
            cost = with_enlarging(cost, enlarge_cost(stages[index - 1].canvas, stage, decode, spec, device, dtype, offload))
        chosen.append(replace(stage, batch=batch))
        costs.append(cost)
    moved = moving_seconds(stages, spec, device, dtype, offload)
    costs.append(replace(decoding, seconds=decoding.seconds + moved))
    return Way(offload=offload, stages=tuple(chosen), decode=decode, costs=tuple(costs))


def within_ram(device: DeviceSpec, held: int) -> DeviceSpec:
    """A CPU works in the memory that `--ram` leaves beside what the process holds anyway."""
    if device.kind != "cpu" or not device.ram_bytes:
        return device
    left = int((device.ram_bytes - held) / CPU_FRAGMENTS)
    return replace(device, budget_bytes=min(device.budget_bytes, max(0, left)))


def with_enlarging(cost: StageCost, enlarging: StageCost) -> StageCost:
    return replace(
        cost,
        peak_bytes=max(cost.peak_bytes, enlarging.peak_bytes),
        flops=cost.flops + enlarging.flops,
        seconds=cost.seconds + enlarging.seconds,
    )


def choose_batch(stage: StagePlan, spec: ModelSpec, device: DeviceSpec, dtype: str, offload: str) -> tuple[int, StageCost]:
    """The fastest number of pictures at once that fits, where two take the same time the larger."""
    most = stage.grid.count * estimates_per_step(stage, spec)
    candidates = sorted({min(batch, most) for batch in (CPU_BATCHES if device.kind == "cpu" else BATCHES)}, reverse=True)
    costs = {batch: stage_cost(stage, spec, device, batch, dtype, offload) for batch in candidates}
    fitting = [batch for batch in candidates if costs[batch].peak_bytes <= device.budget_bytes]
    if not fitting:
        raise BudgetError(f"{stage.name} at {stage.canvas} needs {gib(costs[candidates[-1]].peak_bytes)}")
    best = min(fitting, key=lambda batch: costs[batch].seconds)
    return best, costs[best]


def choose_decode(
    stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str, offload: str
) -> tuple[DecodePlan, StageCost]:
    """The fastest way to decode, and to encode between stages, within the budgets."""
    canvas, least = stages[-1].canvas, None
    best: tuple[DecodePlan, StageCost] | None = None
    for decode in decode_plans(canvas, spec, device):
        cost = decode_cost(canvas, decode, spec, device, dtype, offload)
        host = host_bytes(stages, spec, device, dtype, offload, decode)
        fits = cost.peak_bytes <= device.budget_bytes and (not device.ram_bytes or host <= device.ram_bytes)
        if fits and (best is None or cost.seconds < best[1].seconds):
            best = decode, cost
        least = cost.peak_bytes if least is None else min(least, cost.peak_bytes)
    if best is None:
        raise BudgetError(f"decode at {canvas} needs {gib(least or 0)}")
    return best


def too_small(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str) -> BudgetError:
    """The stage that needs most at its cheapest setting, and the budget with which every stage would run."""
    canvas, offload = stages[-1].canvas, offloads(device)[-1]
    decodes = [decode_cost(canvas, way, spec, device, dtype, offload) for way in decode_plans(canvas, spec, device)]
    costs = [stage_cost(stage, spec, device, 1, dtype, offload) for stage in stages]
    costs += [min(decodes, key=lambda cost: cost.peak_bytes)]
    worst = max(costs, key=lambda cost: cost.peak_bytes)
    if worst.peak_bytes <= device.budget_bytes:
        host = min(host_bytes(stages, spec, device, dtype, name) for name in offloads(device))
        host += int(worst.peak_bytes * CPU_FRAGMENTS) if device.kind == "cpu" else 0
        return BudgetError(
            f"{canvas} needs {gib(host)} of host memory, --ram allows {gib(device.ram_bytes)}: "
            f"--ram {host / 1e9 + 0.1:.1f}GB would do"
        )
    move = f"--vram {worst.peak_bytes / 1e9 + 0.1:.1f}GB would do"
    if any(stage.attention != Global() for stage in stages):
        move += ", or tiles: leave --attention-policy out"
    elif any(stage.grid.count == 1 and stage.canvas.area > 2 * spec.native_px**2 for stage in stages):
        move += ", or --strategy progressive"
    move += ", or smaller windows: --allow-approximate"
    return BudgetError(f"{worst.stage} at {canvas} needs {gib(worst.peak_bytes)}, budget {gib(device.budget_bytes)}: {move}")


def make_ladder(way: Way, spec: ModelSpec, device: DeviceSpec, dtype: str) -> Iterator[Rung]:
    """What is done after running out of memory, cheapest change first; every rung is a complete setting."""
    batch = max(stage.batch for stage in way.stages)
    common = {"decode": way.decode, "exact": True}
    while batch > 1:
        batch //= 2
        peak = max(stage_cost(stage, spec, device, batch, dtype, way.offload).peak_bytes for stage in way.stages)
        reason = f"{batch} picture{'s' if batch > 1 else ''} at once"
        yield Rung(stage="denoise", batch=batch, offload=way.offload, peak_bytes=peak, reason=reason, **common)  # type: ignore[arg-type]
    for offload in offloads(device)[OFFLOADS.index(way.offload) + 1 :]:
        peak = max(stage_cost(stage, spec, device, 1, dtype, offload).peak_bytes for stage in way.stages)
        reason = f"weights {WHERE[offload]}"
        yield Rung(stage="denoise", batch=1, offload=offload, peak_bytes=peak, reason=reason, **common)  # type: ignore[arg-type]
    canvas = way.stages[-1].canvas
    plans = list(decode_plans(canvas, spec, device))
    for less in plans[plans.index(way.decode) + 1 :]:
        peak = decode_cost(canvas, less, spec, device, dtype, way.offload).peak_bytes
        reason = f"decode {less}"
        yield Rung(stage="decode", batch=1, offload=way.offload, decode=less, exact=True, peak_bytes=peak, reason=reason)


def tiny_rung(request: RenderRequest, decode: DecodePlan) -> Iterator[Rung]:
    """The last resort, only where it was asked for: another autoencoder, so another picture."""
    if request.tiny_vae is not None:
        less = replace(decode, policy="tiny", band_rows=0)
        reason = f"approximation: decode with {request.tiny_vae}, as asked for"
        yield Rung(stage="decode", batch=1, decode=less, exact=False, peak_bytes=None, reason=reason)
