"""Third pass: finds the fastest way to run a draft within the budget.

It chooses batches, the VAE's policy and where weights are kept.

The budget decides how a render runs, never what it draws, with one exception that a note names: a stage that only the preset
wants in one piece is tiled if it has no room. All places for the weights are tried; for each of them the stages do not depend
on each other, so the best of each stage is the best of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.kernels.attention_policies import Global
from hires.planning.costs.stages import CostModel
from hires.planning.costs.text import TextPlan
from hires.planning.draft import Draft
from hires.planning.plan import WHERE, DecodePlan, Rung, StageCost, StagePlan
from hires.tiling.geometry import Size
from hires.units import readable

BATCHES = (32, 16, 8, 4, 2, 1)
CPU_BATCHES = (8, 4, 2, 1)  # a tile of the shipped model takes less in 8 than in 4 on two cores, in 16 no less
CPU_FRAGMENTS = 1.25  # resident over requested: pages that the allocator holds between blocks in use
OFFLOADS = tuple(WHERE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes that a render may hold: `device` while tensors are in use, `host` the whole process, 0 for no limit."""

    device: int
    host: int

    def hold(self, cost: StageCost, host: int) -> bool:
        """Whether a stage and the process around it stay within both."""
        return cost.peak_bytes <= self.device and (not self.host or host <= self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The fastest settings for one place of the weights."""

    offload: str
    """The place, one of `OFFLOADS`."""
    stages: tuple[StagePlan, ...]
    decode: DecodePlan
    costs: tuple[StageCost, ...]
    """Those of the stages in turn, then that of decoding."""

    @property
    def seconds(self) -> float:
        """Seconds of all stages and of decoding."""
        return sum(cost.seconds for cost in self.costs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a render runs."""

    best: Candidate
    """The fastest candidate that fits."""
    text: TextPlan
    """How the text encoders run."""
    device: DeviceSpec
    """The device with the budget that was searched within."""
    untiled_bytes: tuple[tuple[str, int], ...]
    """Stages that are tiled because they had no room in one piece, and the bytes that would take."""
    preview_bytes: int
    """What a preview takes beside a stage."""
    weight_bytes: int
    """All weights of network and VAE."""
    ladder: tuple[Rung, ...]
    """What follows after an out-of-memory, in order."""
    alternatives: tuple[str, ...]
    """The other places for the weights, with their seconds or why they do not fit."""

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Costs of all stages, with their previews, of decoding and of the text encoders."""
        *stages, decode = self.best.costs
        previewed = (replace(cost, peak_bytes=cost.peak_bytes + self.preview_bytes) for cost in stages)
        return (*previewed, decode, self.text.cost)


def search(draft: Draft, costs: CostModel) -> Way:
    """The fastest way within the device's budget. BudgetError, with the least budget that would do, if nothing fits."""
    text, device = costs.text, costs.device
    stages, untiled = stages_with_room(draft, costs)
    preview = costs.preview if draft.request.tiny_vae is not None else 0
    limits = Limits(device=int((device.budget_bytes - preview) / (1 + device.slack)), host=device.ram_bytes)
    candidates, alternatives = [], []
    for offload in offloads(device):
        try:
            candidates.append(fastest(stages, costs, limits, offload))
            alternatives.append(f"weights {WHERE[offload]}: about {candidates[-1].seconds:.0f} s")
        except BudgetError as error:
            alternatives.append(f"weights {WHERE[offload]}: {error}")
    if not candidates:
        raise too_small(stages, costs, limits)
    best = min(candidates, key=lambda candidate: candidate.seconds)
    return Way(
        best=best,
        text=text,
        device=device,
        untiled_bytes=untiled,
        preview_bytes=preview,
        weight_bytes=costs.network_bytes + costs.vae_bytes,
        ladder=(*make_ladder(best, costs), *tiny_rung(draft.request.tiny_vae, best.decode)),
        alternatives=() if costs.on_cpu else tuple(alternatives),
    )


def stages_with_room(draft: Draft, costs: CostModel) -> tuple[tuple[StagePlan, ...], tuple[tuple[str, int], ...]]:
    """The stages, tiled where one piece has no room and tiles are allowed; names and bytes of those."""
    device = costs.device
    room = int(max(device.budget_bytes, device.most_bytes) / (1 + device.slack))
    stages, untiled = [], []
    for each in draft.stages:
        least = 0 if each.tiled is None else costs.stage(each.stage, 1, offloads(device)[-1]).peak_bytes
        if each.tiled is None or least <= room:
            stages.append(each.stage)
        else:
            stages.append(each.tiled)
            untiled.append((each.stage.name, least))
    return tuple(stages), tuple(untiled)


def offloads(device: DeviceSpec) -> tuple[str, ...]:
    """The places where a device's weights can be kept, from fast to small."""
    return OFFLOADS[:1] if device.kind == "cpu" else OFFLOADS


def fastest(stages: Sequence[StagePlan], costs: CostModel, limits: Limits, offload: str) -> Candidate:
    """The fastest candidate with the weights at `offload`. BudgetError names the stage that does not fit."""
    least_host = costs.host(stages[-1].canvas, offload)
    if limits.host and least_host > limits.host:
        raise BudgetError(f"needs {readable(least_host)} of host memory, `ram` allows {readable(limits.host)}")
    if costs.on_cpu and limits.host:  # tensors take what `--ram` leaves beside libraries and weights
        left = int((limits.host - least_host) / CPU_FRAGMENTS)
        limits = replace(limits, device=min(limits.device, max(0, left)))
    decode, decoding = choose_decode(stages[-1].canvas, costs, limits, offload)
    chosen: list[StagePlan] = []
    taken: list[StageCost] = []
    for index, stage in enumerate(stages):
        batch, cost = choose_batch(stage, costs, limits, offload)
        if index:
            cost = with_enlarging(cost, costs.enlarge(stages[index - 1].canvas, stage, decode, offload))
        chosen.append(replace(stage, batch=batch))
        taken.append(cost)
    taken.append(replace(decoding, seconds=decoding.seconds + costs.moving_seconds(stages, offload)))
    return Candidate(offload=offload, stages=tuple(chosen), decode=decode, costs=tuple(taken))


def with_enlarging(cost: StageCost, enlarging: StageCost) -> StageCost:
    """The cost of a stage together with that of enlarging the picture it starts from."""
    return replace(
        cost,
        peak_bytes=max(cost.peak_bytes, enlarging.peak_bytes),
        flops=cost.flops + enlarging.flops,
        seconds=cost.seconds + enlarging.seconds,
        enlarge_seconds=enlarging.seconds,
    )


def choose_batch(stage: StagePlan, costs: CostModel, limits: Limits, offload: str) -> tuple[int, StageCost]:
    """The largest batch that fits, which is the fastest: a larger one makes fewer calls for the same FLOPs."""
    most = costs.most_images(stage)
    for batch in sorted({min(batch, most) for batch in (CPU_BATCHES if costs.on_cpu else BATCHES)}, reverse=True):
        cost = costs.stage(stage, batch, offload)
        if cost.peak_bytes <= limits.device:
            return batch, cost
    raise BudgetError(f"stage {stage.name} at {stage.canvas} needs {readable(cost.peak_bytes)}")


def choose_decode(canvas: Size, costs: CostModel, limits: Limits, offload: str) -> tuple[DecodePlan, StageCost]:
    """The fastest way to decode, and to encode between stages, within both limits."""
    plans = {decode: costs.decode(canvas, decode, offload) for decode in costs.decode_plans(canvas)}
    fitting = [decode for decode, cost in plans.items() if limits.hold(cost, costs.host(canvas, offload, decode))]
    if not fitting:
        raise BudgetError(f"decode at {canvas} needs {readable(min(cost.peak_bytes for cost in plans.values()))}")
    best = min(fitting, key=lambda decode: plans[decode].seconds)
    return best, plans[best]


def too_small(stages: Sequence[StagePlan], costs: CostModel, limits: Limits) -> BudgetError:
    """The stage that needs most at its cheapest setting, and the budget with which every stage would run."""
    canvas, device = stages[-1].canvas, costs.device
    offload = offloads(device)[-1]
    decodes = [costs.decode(canvas, decode, offload) for decode in costs.decode_plans(canvas)]
    least = [costs.stage(stage, 1, offload) for stage in stages]
    least.append(min(decodes, key=lambda cost: cost.peak_bytes))
    worst = max(least, key=lambda cost: cost.peak_bytes)
    if worst.peak_bytes <= limits.device:
        host = min(costs.host(canvas, name) for name in offloads(device))
        host += int(worst.peak_bytes * CPU_FRAGMENTS) if costs.on_cpu else 0
        return BudgetError(
            f"{canvas} needs {readable(host)} of host memory, `ram` allows {readable(device.ram_bytes)}: "
            f"`ram` {host / 1e9 + 0.1:.1f}GB would do{', or `weights` int8' if costs.packing is None else ''}"
        )
    move = f"`vram` {worst.peak_bytes / 1e9 + 0.1:.1f}GB would do"
    if any(stage.attention != Global() for stage in stages):
        move += ", or tiles: leave `attention_policy` out"
    elif any(stage.grid.count == 1 and stage.canvas.area > 2 * costs.spec.native_px**2 for stage in stages):
        move += ", or `strategy` progressive"
    return BudgetError(
        f"stage {worst.stage} at {canvas} needs {readable(worst.peak_bytes)}, budget {readable(limits.device)}: {move}"
    )


def make_ladder(best: Candidate, costs: CostModel) -> Iterator[Rung]:
    """Complete settings to try after running out of memory, each smaller than the one before."""
    batch = max(stage.batch for stage in best.stages)
    while batch > 1:
        batch //= 2
        reason = f"{batch} picture{'s' if batch > 1 else ''} at once"
        yield denoise_rung(best, costs, batch, best.offload, reason)
    for offload in offloads(costs.device)[OFFLOADS.index(best.offload) + 1 :]:
        yield denoise_rung(best, costs, 1, offload, f"weights {WHERE[offload]}")
    canvas = best.stages[-1].canvas
    plans = list(costs.decode_plans(canvas))
    for decode in plans[plans.index(best.decode) + 1 :]:
        peak, reason = costs.decode(canvas, decode, best.offload).peak_bytes, f"decode {decode}"
        yield Rung(stage="decode", batch=1, offload=best.offload, decode=decode, exact=True, peak_bytes=peak, reason=reason)


def denoise_rung(best: Candidate, costs: CostModel, batch: int, offload: str, reason: str) -> Rung:
    """A smaller setting for all denoising stages."""
    peak = max(costs.stage(stage, batch, offload).peak_bytes for stage in best.stages)
    return Rung(stage="denoise", batch=batch, offload=offload, decode=best.decode, exact=True, peak_bytes=peak, reason=reason)


def tiny_rung(tiny_vae: str | None, decode: DecodePlan) -> Iterator[Rung]:
    """The last resort, if the user gave one: a small autoencoder, which draws another picture."""
    if tiny_vae is not None:
        reason = f"approximation: decode with {tiny_vae}, as asked for"
        tiny = replace(decode, policy="tiny", band_rows=0)
        yield Rung(stage="decode", batch=1, decode=tiny, exact=False, peak_bytes=None, reason=reason)
