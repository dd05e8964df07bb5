"""Predicts the bytes, FLOPs and seconds of each stage of a plan.

Imports no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hires.checkpoints.model import ModelSpec
from hires.devices import machines
from hires.devices.spec import DeviceSpec
from hires.planning.costs.evaluations import estimates, estimates_per_step
from hires.planning.costs.flops import attention_flops, network_flops
from hires.planning.costs.network_memory import network_live_bytes, preview_bytes
from hires.planning.costs.text import TextPlan, choose_text
from hires.planning.costs.weights import storage_of, stored_bytes, widening_bytes
from hires.planning.plan import DecodePlan, StageCost, StagePlan
from hires.sampling import registry
from hires.tiling.bands import storage
from hires.tiling.bands.storage import VAE_POLICIES, BandStorage
from hires.tiling.geometry import Size
from hires.units import BYTES_PER_ELEMENT

STREAMED_BYTES = 2**28  # of 16-bit weights fetched layer by layer: one at work, the next, what is not yet given back
LIBRARY_BYTES = 700 * 2**20  # a process that has imported torch, diffusers and transformers, before any weight
CANVAS_BUFFERS = 6  # float32 copies of the canvas latents a step holds, besides what its sampler keeps
GUIDE_BUFFERS = 5  # more with guides: the guiding image, its low band, the estimate's and their difference


def decode_dtype(device: DeviceSpec) -> str:
    """The VAE's number type: an SDXL-type VAE overflows in fp16, so bf16 if the device has it, else fp32."""
    return "bf16" if device.kind != "cpu" and device.bf16 else "fp32"


def compute_seconds(flops: float, attention: float, device: DeviceSpec) -> float:
    """Seconds for `flops`, of which `attention` are scores and values, at the rates the device sustains."""
    return (flops - attention) / device.flops + attention / (device.attention_flops or device.flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """What a denoising stage computes, whatever the batch and wherever the weights are."""

    images: tuple[int, ...]
    """Network evaluations in turn: how many images (tiles times conditions) each of them covers."""
    image_flops: float
    attention_flops: float
    """The part of `image_flops` that is attention's scores and values."""
    canvas_bytes: int
    """float32 latents of the whole canvas: the sampler's and the guides'."""


class CostModel:
    """Predicts bytes, FLOPs and seconds of a model on a device in one number type; results are cached.

    weights: how they are packed, None for the number type itself.

    The budget of `device` decides only where the text encoders run (`text`); all other costs hold for any budget.
    """

    def __init__(self, spec: ModelSpec, device: DeviceSpec, dtype: str, weights: str | None = None) -> None:
        self.spec, self.device, self.dtype, self.packing = spec, device, dtype, weights
        self.on_cpu = device.kind == "cpu"
        self.decode_dtype = decode_dtype(device)
        self._work: dict[StagePlan, StageWork] = {}
        self._stages: dict[tuple[StagePlan, int, str], StageCost] = {}
        self._decodes: dict[tuple[Size, DecodePlan, str], StageCost] = {}

    def stage(self, stage: StagePlan, batch: int, offload: str = "none") -> StageCost:
        """One denoising stage with at most `batch` images (tiles times conditions) at once."""
        plain = replace(stage, batch=1) if stage.batch != 1 else stage
        key = plain, min(batch, self.most_images(stage)), offload
        if key not in self._stages:
            self._stages[key] = self.stage_cost(*key)
        return self._stages[key]

    def most_images(self, stage: StagePlan) -> int:
        """All images that one step of a stage evaluates: every tile for every condition."""
        return estimates_per_step(stage, self.spec) * stage.grid.count

    def stage_cost(self, stage: StagePlan, batch: int, offload: str) -> StageCost:
        """The cost of a stage, computed anew; `stage` is the cached way."""
        if stage not in self._work:
            self._work[stage] = self.stage_work(stage)
        work, element = self._work[stage], BYTES_PER_ELEMENT[self.dtype]
        live = network_live_bytes(
            self.spec.network, stage.grid.tile, batch, element, self.on_cpu, self.spec.text_tokens, stage.attention
        )
        calls = sum(-(-count // batch) for count in work.images)
        seconds = sum(work.images) * compute_seconds(work.image_flops, work.attention_flops, self.network_device)
        seconds += calls * self.device.call_seconds
        if offload == "layers":  # weights arrive while others compute: the slower of the two decides
            seconds = max(seconds, calls * self.network_bytes / self.device.copy_bytes_per_second)
        return StageCost(
            stage=stage.name,
            peak_bytes=int(self.weights(offload, "network") + self.widening("network") + live + work.canvas_bytes),
            flops=sum(work.images) * work.image_flops,
            seconds=seconds,
        )

    def together(self, stage: StagePlan, pictures: int, batch: int, offload: str) -> int:
        """Peak bytes of a stage of several pictures at once, of which `batch` images (tiles times conditions) are evaluated."""
        cost = self.stage_cost(replace(stage, batch=1), batch, offload)
        return cost.peak_bytes + (pictures - 1) * self.stage_work(stage).canvas_bytes

    def stage_work(self, stage: StagePlan) -> StageWork:
        """Count the evaluations of a stage and the FLOPs of one of them."""
        spec, tile = self.spec, stage.grid.tile
        buffers = CANVAS_BUFFERS + registry.SAMPLER_FACTS[stage.sampler].canvas_latents + (GUIDE_BUFFERS if stage.guides else 0)
        return StageWork(
            images=tuple(count * stage.grid.count for count in estimates(stage, spec)),
            image_flops=network_flops(spec.network, tile.height, tile.width, spec.text_tokens, stage.attention),
            attention_flops=attention_flops(spec.network, tile.height, tile.width, stage.attention),
            canvas_bytes=buffers * 4 * spec.facts.latent_channels * stage.grid.canvas.area,
        )

    @functools.cached_property
    def network_device(self) -> DeviceSpec:
        """The device at the rate at which it runs the network: a CPU with bf16 units is faster in bf16."""
        quick = self.on_cpu and self.dtype == "bf16" and self.device.bf16
        return replace(self.device, flops=self.device.flops * machines.CPU_BF16_GAIN) if quick else self.device

    @functools.cached_property
    def network_bytes(self) -> int:
        """Bytes of the network's weights as they are kept."""
        if self.packing is None:
            return self.spec.network_params * BYTES_PER_ELEMENT[self.dtype]
        return stored_bytes(self.spec.network_count, self.packing, BYTES_PER_ELEMENT[self.dtype])

    @functools.cached_property
    def vae_bytes(self) -> int:
        """Bytes of the VAE's weights as they are kept."""
        storage, element = storage_of(self.packing, "vae"), BYTES_PER_ELEMENT[self.decode_dtype]
        return self.spec.vae_params * element if storage is None else stored_bytes(self.spec.vae_count, storage, element)

    def widening(self, at_work: str) -> int:
        """Bytes that the largest packed layer of the 'network' or the 'vae' takes beside its maps while it computes."""
        if at_work == "vae":
            return widening_bytes(self.spec.vae_count, storage_of(self.packing, "vae"), BYTES_PER_ELEMENT[self.decode_dtype])
        return widening_bytes(self.spec.network_count, self.packing, BYTES_PER_ELEMENT[self.dtype])

    def weights(self, offload: str, at_work: str) -> int:
        """Bytes of weights on a card while the 'network' or the 'vae' works; a CPU's budget counts no weights."""
        if self.on_cpu:
            return 0
        network, vae = self.network_bytes, self.vae_bytes
        if offload == "none":
            return network + vae
        if at_work == "vae":
            return vae
        return network if offload == "components" else min(network, self.streamed_bytes)

    @functools.cached_property
    def streamed_bytes(self) -> int:
        """Bytes of the layers on a card where they are fetched one by one, fewer where they are packed."""
        if self.packing is None:
            return STREAMED_BYTES
        return int(STREAMED_BYTES * self.network_bytes / (2 * self.spec.network_count.values))

    def decode(self, canvas: Size, decode: DecodePlan, offload: str = "none") -> StageCost:
        """Peak bytes of decoding or of encoding, whichever is more; FLOPs and seconds of decoding."""
        key = canvas, decode, offload
        if key not in self._decodes:
            decoding, encoding = (self.vae(canvas, decode, encode=encode) for encode in (False, True))
            image = 4 * 3 * canvas.area // 4 if self.on_cpu else 0  # of the stage before, while it is enlarged
            self._decodes[key] = StageCost(
                stage="decode",
                peak_bytes=self.weights(offload, "vae")
                + self.widening("vae")
                + image
                + max(decoding.peak_bytes, encoding.peak_bytes),
                flops=decoding.flops,
                seconds=self.vae_seconds(decoding, canvas),
            )
        return self._decodes[key]

    def decode_plans(self, canvas: Size) -> Iterator[DecodePlan]:
        """Every way to run the autoencoder on a canvas, from fast to small; a CPU has no other memory to move maps to."""
        names = VAE_POLICIES[:-1] if self.on_cpu else VAE_POLICIES
        cells, dtype = canvas.divided(self.spec.cell_px), self.decode_dtype
        for name in names:
            if storage.indexable(self.spec.vae, cells, name):
                yield DecodePlan(policy=name, band_rows=0 if name == "whole" else storage.BAND_ROWS[0], dtype=dtype)
        for rows in storage.BAND_ROWS[1:]:
            yield DecodePlan(policy=names[-1], band_rows=rows, dtype=dtype)

    def vae(self, canvas: Size, decode: DecodePlan, *, encode: bool) -> BandStorage:
        """Bytes and FLOPs of the autoencoder alone, its weights not included."""
        cells, element = canvas.divided(self.spec.cell_px), BYTES_PER_ELEMENT[decode.dtype]
        task = storage.VaeTask(shape=self.spec.vae, cells=cells, element=element, cpu=self.on_cpu, encode=encode)
        return storage.vae_policy(task, decode.policy, decode.band_rows)

    def vae_seconds(self, way: BandStorage, canvas: Size) -> float:
        """Bands are fetched from host memory while others are computed: the slower of the two decides."""
        cells = canvas.divided(self.spec.cell_px).area
        mixing = 4.0 * self.spec.vae.channels[-1] * cells * cells if self.spec.vae.mid_attention else 0.0
        computing = compute_seconds(way.flops, mixing, self.device)
        return max(computing, way.moved_bytes / self.device.copy_bytes_per_second)

    def enlarge(self, before: Size, stage: StagePlan, decode: DecodePlan, offload: str = "none") -> StageCost:
        """Bring the canvas `before` to this stage's: decode it and encode it enlarged, or nothing in latents."""
        if stage.enlarger in (None, "latent"):
            return StageCost(stage=stage.name, peak_bytes=0, flops=0.0, seconds=0.0)
        cell = self.spec.cell_px
        small, large = before.divided(cell).times(cell), stage.grid.canvas.times(cell)
        decoding, encoding = self.vae(small, decode, encode=False), self.vae(large, decode, encode=True)
        return StageCost(
            stage=stage.name,
            peak_bytes=self.decode(stage.canvas, decode, offload).peak_bytes,
            flops=decoding.flops + encoding.flops,
            seconds=self.vae_seconds(decoding, small) + self.vae_seconds(encoding, large),
        )

    def moving_seconds(self, stages: Sequence[StagePlan], offload: str) -> float:
        """Seconds to move network and VAE to the card and back between stages, where only one of them is there."""
        if offload == "none" or self.on_cpu:
            return 0.0
        both = (self.network_bytes if offload == "components" else 0) + self.vae_bytes
        turns = sum(stage.enlarger == "pixel" for stage in stages)
        return both * (2 * turns + 1) / self.device.copy_bytes_per_second

    def host(self, canvas: Size, offload: str, decode: DecodePlan | None = None) -> int:
        """Host memory of the process: libraries, the finished image, and the weights and maps that are kept there.

        What a CPU works with is its budget and not counted here.
        """
        held = LIBRARY_BYTES + 3 * canvas.area
        if offload != "none" or self.on_cpu:
            held += self.network_bytes + self.vae_bytes
        if decode is not None and decode.policy == "host":
            held += self.vae(canvas, decode, encode=False).host_bytes
        return held

    @functools.cached_property
    def text(self) -> TextPlan:
        """Where the text encoders run. BudgetError if they fit nowhere."""
        return choose_text(self.spec, self.device, self.dtype)

    @functools.cached_property
    def preview(self) -> int:
        """Peak bytes of drawing a preview with a small autoencoder."""
        return preview_bytes(4 if self.on_cpu else 2, self.on_cpu)
