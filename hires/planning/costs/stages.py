"""What each stage of a plan takes, weights included, by where the weights are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hires.checkpoints.spec import ModelSpec
from hires.devices import machines
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.planning.costs import flops as cost
from hires.planning.costs import network_memory
from hires.planning.costs.evaluations import estimates, estimates_per_step
from hires.planning.costs.network_memory import text_live_bytes
from hires.planning.plan import DecodePlan, StageCost, StagePlan
from hires.sampling import registry
from hires.tiling.bands import storage
from hires.tiling.bands.storage import VAE_POLICIES, BandStorage
from hires.tiling.geometry import Size
from hires.units import BYTES_PER_ELEMENT, gib

LARGE_TOWER = 10**9  # parameters above which text towers are weighed against host memory
STREAMED_BYTES = 2**28  # of weights fetched layer by layer: the layer at work, the next one, and what is not yet given back
LIBRARY_BYTES = 700 * 2**20  # a process that has imported torch, diffusers and transformers, before any weight
CANVAS_BUFFERS = 6  # float32 copies of the canvas latents a step holds, besides what its sampler keeps
GUIDE_BUFFERS = 5  # more where guides hold it to a picture: the picture, its low band, the estimate's and their difference


def choose_dtype(asked: str, device: DeviceSpec) -> tuple[str, str]:
    if asked != "auto":
        return asked, "as asked for"
    if device.kind == "cpu":
        quicker = f"; --dtype bf16 takes the network about {1 / machines.CPU_BF16_GAIN:.0%} of the time" if device.bf16 else ""
        return "fp32", f"the CPU's exact type, the same picture with any number of tiles at once{quicker}"
    return ("bf16", "half the bytes, no overflow") if device.bf16 else ("fp16", "this card has no bf16")


def decode_dtype(device: DeviceSpec) -> str:
    """The VAE's type: an SDXL-type VAE overflows in fp16, so bf16 where there is one, else fp32."""
    return "bf16" if device.kind != "cpu" and device.bf16 else "fp32"


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
    seconds = flops / ((os.cpu_count() or 1) * machines.CPU_CORE_FLOPS)
    on_host = replace(on_device, peak_bytes=0, seconds=seconds)
    notes = (
        ()
        if device.kind == "cpu"
        else (f"text encoders run on the CPU: they need {gib(weights)} of {gib(device.budget_bytes)}",)
    )
    if spec.text_params < LARGE_TOWER:
        return TextPlan(cost=on_host, on_host=device.kind != "cpu", dtype="fp32", notes=notes)
    free = machines.available_host_bytes()
    fitting = next((kind for kind in ("fp32", "bf16") if spec.text_params * BYTES_PER_ELEMENT[kind] <= 0.8 * free), None)
    if fitting is None and not device.elsewhere:
        raise BudgetError(
            f"text encoders need {gib(spec.text_params * 2)} of host memory in bf16, {gib(free)} are free: close other programs"
        )
    chosen = fitting or "bf16"
    size = gib(spec.text_params * BYTES_PER_ELEMENT[chosen])
    notes = (*notes, f"text encoders in {chosen}: {size} of host memory while the prompts are encoded, then freed")
    return TextPlan(cost=on_host, on_host=device.kind != "cpu", dtype=chosen, notes=notes)


def stage_cost(
    stage: StagePlan, spec: ModelSpec, device: DeviceSpec, batch: int, dtype: str, offload: str = "none"
) -> StageCost:
    """Peak bytes, FLOPs and seconds of one denoising stage with `batch` pictures at once: tiles, each for every estimate."""
    tile, words = stage.grid.tile, spec.facts.tokens
    element, cpu = BYTES_PER_ELEMENT[dtype], device.kind == "cpu"
    units = estimates_per_step(stage, spec) * stage.grid.count
    pictures = min(batch, units)
    live = network_memory.network_live_bytes(spec.network, tile, pictures, element, cpu, words, stage.attention)
    buffers = CANVAS_BUFFERS + registry.SAMPLERS[stage.sampler].kept + (GUIDE_BUFFERS if stage.guides else 0)
    canvas = buffers * 4 * spec.facts.latent_channels * stage.grid.canvas.area
    weights = weights_on_device(spec, dtype, device, offload, "network")
    counts = [count * stage.grid.count for count in estimates(stage, spec)]
    each = cost.network_flops(spec.network, tile.height, tile.width, words, stage.attention)
    mixing = cost.attention_flops(spec.network, tile.height, tile.width, stage.attention)
    calls = sum(-(-count // pictures) for count in counts)
    rated = replace(device, flops=device.flops * machines.CPU_BF16_GAIN) if cpu and dtype == "bf16" and device.bf16 else device
    computing = sum(counts) * compute_seconds(each, mixing, rated) + calls * device.call_seconds
    fetching = calls * spec.network_params * element / device.copy_bytes_per_second if offload == "layers" else 0.0
    return StageCost(
        stage=stage.name,
        peak_bytes=int(weights + live + canvas),
        flops=sum(counts) * each,
        seconds=max(computing, fetching),
    )


def compute_seconds(flops: float, attention: float, device: DeviceSpec) -> float:
    """Seconds for some FLOPs, of which `attention` are scores and values, at the rates that the device sustains."""
    return (flops - attention) / device.flops + attention / (device.attention_flops or device.flops)


def weights_on_device(spec: ModelSpec, dtype: str, device: DeviceSpec, offload: str, at_work: str) -> int:
    """Weights that a card holds while the 'network' or the 'vae' works; on a CPU they are no part of the budget."""
    if device.kind == "cpu":
        return 0
    network = spec.network_params * BYTES_PER_ELEMENT[dtype]
    vae = spec.vae_params * BYTES_PER_ELEMENT[decode_dtype(device)]
    if offload == "none":
        return network + vae
    if at_work == "vae":
        return vae
    return network if offload == "components" else min(network, STREAMED_BYTES)


def decode_cost(
    canvas: Size, decode: DecodePlan, spec: ModelSpec, device: DeviceSpec, dtype: str, offload: str = "none"
) -> StageCost:
    """Peak bytes of decoding and of encoding, whichever is more; FLOPs and seconds of decoding."""
    decoding, encoding = (vae_way(canvas, decode, spec, device, encode=encode) for encode in (False, True))
    picture = 4 * 3 * canvas.area // 4 if device.kind == "cpu" else 0  # that of the stage before, while it is enlarged
    weights = weights_on_device(spec, dtype, device, offload, "vae")
    peak = weights + picture + max(decoding.peak_bytes, encoding.peak_bytes)
    return StageCost(stage="decode", peak_bytes=peak, flops=decoding.flops, seconds=vae_seconds(decoding, canvas, spec, device))


def vae_way(canvas: Size, decode: DecodePlan, spec: ModelSpec, device: DeviceSpec, *, encode: bool) -> BandStorage:
    cells, cpu = canvas.divided(spec.cell_px), device.kind == "cpu"
    element = BYTES_PER_ELEMENT[decode.dtype]
    return storage.vae_policy(spec.vae, cells, element, decode.policy, decode.band_rows, cpu=cpu, encode=encode)


def vae_seconds(way: BandStorage, canvas: Size, spec: ModelSpec, device: DeviceSpec) -> float:
    """Bands in host memory are fetched while others are computed: the slower of the two decides."""
    cells = canvas.divided(spec.cell_px).area
    mixing = 4.0 * spec.vae.channels[-1] * cells * cells if spec.vae.mid_attention else 0.0
    return max(compute_seconds(way.flops, mixing, device), way.moved_bytes / device.copy_bytes_per_second)


def enlarge_cost(
    before: Size, stage: StagePlan, decode: DecodePlan, spec: ModelSpec, device: DeviceSpec, dtype: str, offload: str = "none"
) -> StageCost:
    """What it takes to bring the picture of the stage before to this stage's canvas: decoding and encoding, or nothing."""
    if stage.enlarger in (None, "latent"):
        return StageCost(stage=stage.name, peak_bytes=0, flops=0.0, seconds=0.0)
    peak = decode_cost(stage.canvas, decode, spec, device, dtype, offload).peak_bytes
    canvases = before.divided(spec.cell_px).times(spec.cell_px), stage.grid.canvas.times(spec.cell_px)
    ways = [
        vae_way(canvas, decode, spec, device, encode=encode) for canvas, encode in zip(canvases, (False, True), strict=True)
    ]
    seconds = sum(vae_seconds(way, canvas, spec, device) for way, canvas in zip(ways, canvases, strict=True))
    return StageCost(stage=stage.name, peak_bytes=peak, flops=sum(way.flops for way in ways), seconds=seconds)


def decode_plans(canvas: Size, spec: ModelSpec, device: DeviceSpec) -> Iterator[DecodePlan]:
    """Every way to run the autoencoder at that size, from fast to small. Host memory is no other place for a CPU."""
    names = VAE_POLICIES[:-1] if device.kind == "cpu" else VAE_POLICIES
    cells = canvas.divided(spec.cell_px)
    for name in (name for name in names if storage.indexable(spec.vae, cells, name)):
        yield DecodePlan(policy=name, band_rows=0 if name == "whole" else storage.BAND_ROWS[0], dtype=decode_dtype(device))
    for rows in storage.BAND_ROWS[1:]:
        yield DecodePlan(policy=names[-1], band_rows=rows, dtype=decode_dtype(device))


def moving_seconds(stages: Sequence[StagePlan], spec: ModelSpec, device: DeviceSpec, dtype: str, offload: str) -> float:
    """What it takes to bring network and autoencoder to the card and back between stages, where one at a time is there."""
    if offload == "none" or device.kind == "cpu":
        return 0.0
    network = spec.network_params * BYTES_PER_ELEMENT[dtype] if offload == "components" else 0
    both = network + spec.vae_params * BYTES_PER_ELEMENT[decode_dtype(device)]
    turns = sum(stage.enlarger == "pixel" for stage in stages)
    return both * (2 * turns + 1) / device.copy_bytes_per_second


def host_bytes(
    stages: Sequence[StagePlan],
    spec: ModelSpec,
    device: DeviceSpec,
    dtype: str,
    offload: str,
    decode: DecodePlan | None = None,
) -> int:
    """Host memory of the whole process: libraries, the picture, and the weights and maps that are kept there.

    What a CPU works with is its budget and not counted here.
    """
    canvas = stages[-1].canvas
    held = LIBRARY_BYTES + 3 * canvas.area
    if offload != "none" or device.kind == "cpu":
        vae_dtype = decode_dtype(device)
        held += spec.network_params * BYTES_PER_ELEMENT[dtype] + spec.vae_params * BYTES_PER_ELEMENT[vae_dtype]
    if decode is not None and decode.policy == "host":
        held += vae_way(canvas, decode, spec, device, encode=False).host_bytes
    return held
