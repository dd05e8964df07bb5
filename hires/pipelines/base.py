"""A loaded model (`Family`), and one request on it (`Session`).

A session gives conditions, a denoiser, and latents to pixels and back.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hires.checkpoints.families import UNetShape
from hires.checkpoints.model import ModelSpec, embeds_guidance, sigma_table
from hires.devices.probe import TORCH_DTYPE
from hires.errors import NotFiniteError
from hires.images.whole import fitted, to_uint8
from hires.kernels.attention_policies import Attending, everywhere
from hires.models.adapters.controlnet import ControlBlock
from hires.models.attention_processors import attention_backend
from hires.models.offload import Weights
from hires.models.precision import Guarded
from hires.models.previews import mapped, thumbnail
from hires.options.render import RenderRequest
from hires.planning.costs.evaluations import stage_levels
from hires.planning.plan import DecodePlan, MemoryPlan, StagePlan
from hires.prompts.script import Script, Step, step_at
from hires.protocols import Denoiser, Network
from hires.refine.low_pass import Fourier
from hires.sampling.conditioning import Conditioning, SizeCondition, guidance_embedding
from hires.sampling.denoisers import consistency, edm_v, eps, v, x0
from hires.sampling.guidance import Guidance, composed, guided
from hires.tiling.geometry import Size
from hires.tiling.halo import HaloVAE
from hires.tiling.resize import Padded
from hires.tiling.retry import Ladder, attempt
from hires.tiling.vae import OnBand, PixelSource, TiledVAE

PREVIEW_PX = 4  # per cell of a linear preview
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Where and how the networks of one request run."""

    device: torch.device
    dtype: str
    """The network's type, a key of `TORCH_DTYPE`."""
    decode: Ladder[DecodePlan]
    """The ways to decode, from the one in use down; that one decides the VAE's type."""
    backend: str | None = None
    """The attention backend of the network; None lets the dispatch choose."""
    offload: str = "none"
    """Where the weights are kept, one of `search.OFFLOADS`."""
    weights: str | None = None
    """How they are packed, one of `declarations.WEIGHTS`; None for the types themselves."""

    @classmethod
    def of(
        cls, request: RenderRequest, plan: MemoryPlan, device: torch.device, decode: Ladder[DecodePlan] | None = None
    ) -> Runtime:
        """As a plan says; without a ladder the VAE decodes in the planned way only."""
        ladder = Ladder([plan.decode], str) if decode is None else decode
        return cls(
            device=device,
            dtype=plan.dtype,
            decode=ladder,
            backend=request.attention,
            offload=plan.offload,
            weights=plan.weights,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class Family:
    """A model's networks in memory: nothing of a request, so that one after another can run on it."""

    spec: ModelSpec
    """The checkpoint with its LoRAs."""
    network: nn.Module
    """A UNet2DConditionModel or PixArtTransformer2DModel."""
    vae: nn.Module
    """An AutoencoderKL."""
    weights: Weights
    """Where the weights of both are kept; it goes on to a smaller place after an out-of-memory."""
    tiny: HaloVAE | None = None
    """A small autoencoder for previews."""
    control: tuple[ControlBlock, ...] = ()
    """The copies of a PixArt ControlNet."""

    @classmethod
    def of(cls, spec: ModelSpec, network: nn.Module, vae: nn.Module, runtime: Runtime) -> Family:
        """Two modules as a family that runs as `runtime` says."""
        return cls(spec=spec, network=network, vae=vae, weights=Weights(network, vae, runtime.device, runtime.offload))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all of its weights, wherever they are."""
        modules = (self.network, self.vae, *self.control, *(() if self.tiny is None else (self.tiny.vae,)))
        return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """When each text of a request applies, and what the network is told about the size."""

    script: Script = field(default_factory=lambda: Script(texts=()))
    size: SizeCondition = field(default_factory=SizeCondition)


def guidance_of(stage: StagePlan) -> Guidance:
    """The guidance policy of a stage.

    Where it has two weights they split at half the canvas's finest frequency: what a picture of half the side can hold.
    """
    high = stage.guidance if stage.guidance_high is None else stage.guidance_high
    interval = stage.guidance_interval or (0.0, math.inf)
    low_pass = None if high == stage.guidance else Fourier(0.25)
    return Guidance(low=stage.guidance, high=high, low_pass=low_pass, rescale=stage.guidance_rescale, interval=interval)


def preconditioned(spec: ModelSpec, network: Network) -> Denoiser:
    """The denoiser of a checkpoint's network, by its parameterisation; a consistency model's keeps its boundary."""
    if spec.parameterisation == "edm_v":
        return edm_v(network)
    table = sigma_table(spec)
    assert table is not None, f"{spec.family} has neither EDM's parameterisation nor timesteps"
    denoise = {"eps": eps, "v": v, "x0": x0}[spec.parameterisation](network, table)
    return consistency(denoise, table) if spec.facts.few_step == "lcm" else denoise


class Session(ABC):
    """One request on a loaded model, ready to be run by a strategy; each kind of model adds its network.

    Convolutions run channels-last on a CPU. What it installs in the modules, the next session replaces.

    Args:
        family: the model.
        texts: the conditions of the prompt and of the negative prompt, then those of further texts.
        runtime: where and how the networks run.
        picture: (H, W, 3) uint8 that the network sees beside the noisy latents; `picture_at` encodes it once per canvas.

    `prompted` says which of the texts applies at which step, by default the first two at all of them, and what the network is
    told about the size.
    """

    def __init__(
        self,
        family: Family,
        texts: Sequence[Conditioning],
        runtime: Runtime,
        *,
        picture: NDArray[np.uint8] | None = None,
    ) -> None:
        device, decode = runtime.device, runtime.decode
        self.guard = Guarded()
        self.backend, self.weights = runtime.backend, family.weights
        self.spec, self.device, self.dtype = family.spec, device, TORCH_DTYPE[runtime.dtype]
        self._texts, self._vae_dtype = texts, TORCH_DTYPE[decode.rung.dtype]
        self.vae = TiledVAE.on_ladder(convolutions_last(family.vae, device), decode)
        self.tiny, self.picture, self.prompted = family.tiny, picture, Prompted()
        self.picture_at = lru_cache(maxsize=1)(self._encoded)

    def conditions(self, canvas_px: Size) -> list[Conditioning]:
        """The conditions of every text for a canvas of that many pixels: prompt, negative prompt, further texts."""
        return [self.sized(text, canvas_px).to(self.device, self.dtype) for text in self._texts]

    def backends(self, tile: Size) -> tuple[tuple[str, str], ...]:
        """Which backend runs the widest self-attention of a tile (in cells), by the dispatch's own rule."""
        return (("attention", attention_backend(self.spec, tile, self.device, self.dtype, self.backend)),)

    @abstractmethod
    def denoiser(self, policy: Attending = everywhere) -> Denoiser:
        """The preconditioned network; `policy(time)` says which latent cells its self-attention attends to."""

    def guided(self, on_canvas: Denoiser, stage: StagePlan) -> tuple[Denoiser, Conditioning]:
        """The guided denoiser of a stage's whole canvas, and the conditions to call it with.

        Where the texts change from step to step, each noise level is guided by those of its step.
        """
        texts = self.conditions(stage.canvas)
        steps = self.prompted.script.steps(stage.name)
        guides = {step: self.guided_by(on_canvas, stage, texts, step) for step in dict.fromkeys(steps)}
        if len(guides) == 1:
            return next(iter(guides.values()))
        levels = stage_levels(self.spec, stage)

        def of_step(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
            denoise, own = guides[steps[min(step_at(levels, sigma), len(steps) - 1)]]
            return denoise(x, sigma, own)

        return of_step, guides[steps[0]][1]

    def guided_by(
        self, on_canvas: Denoiser, stage: StagePlan, texts: Sequence[Conditioning], step: Step
    ) -> tuple[Denoiser, Conditioning]:
        """The guided denoiser of one step, and the conditions to call it with; texts: of the stage's canvas."""
        guidance = guidance_of(stage)
        if embeds_guidance(self.spec):  # the network is told the scale, and its estimate is guided already
            assert isinstance(self.spec.network, UNetShape), "only UNets are told the guidance scale"
            told = guidance_embedding(stage.guidance, self.spec.network.guidance_width, texts[0].batch)
            texts = [replace(text, guidance=told.to(text.tokens)) for text in texts]
            guidance = Guidance(low=1.0, high=1.0)
        negative, ((first, weight), *others) = texts[step.negative], step.positive
        if not others and weight == 1.0:
            return guided(on_canvas, negative, guidance), texts[first]
        parts = [(texts[place], share) for place, share in step.positive]
        return composed(on_canvas, parts, negative, guidance), texts[first]

    def calls(self, stage: StagePlan) -> int:
        """How many calls of the tiled network an evaluation of a stage takes: two conditions go through each."""
        most = max(len(step.positive) for step in self.prompted.script.steps(stage.name))
        return 1 if most == 1 else -(-(most + 1) // 2)

    @abstractmethod
    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        """A prompt's conditions plus the canvas size in pixels, in the form that the network takes it."""

    def decode_bands(self, latents: Tensor, on_band: OnBand, start: int = 0) -> Iterator[Tensor]:
        """Decode latents (B, C, h, w) to rows (B, 3, rows, W) in about [-1, 1], on the device, from row `start` down."""
        self.weights.ready("vae")
        scaled = (latents / self.spec.latent_scale).to(self.device, self._vae_dtype)
        yield from self.vae.decode_bands(self.laid_out(scaled), on_band, start)

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        """Encode a picture to the posterior's mean, (B, C, h, w) float32 in the scale the sampler works in."""
        self.weights.ready("vae")
        return self.vae.encode(source, on_band).float() * self.spec.latent_scale

    def _encoded(self, canvas: Size) -> Tensor:
        """The latents of the picture that the network sees beside the noisy ones, at a canvas; the posterior's mean, scaled."""
        assert self.picture is not None, "this network sees a picture"
        with torch.inference_mode():
            latents = self.encode(Padded(fitted(self.picture, canvas), canvas), lambda done, total: None)
        return latents.to(self.device, self.dtype)

    def decode_tiny(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        """Decode by the small autoencoder `tiny`: an approximation of `decode_bands`."""
        assert self.tiny is not None, "a small autoencoder was loaded"
        yield from self.tiny.decode_bands(latents, on_band)

    def preview(self, latents: Tensor) -> NDArray[np.uint8] | None:
        """Latents (1, C, h, w) as a small picture (h', w', 3), at most `PREVIEW_CELLS` cells a side.

        `tiny` decodes it; without one, a linear map per cell does. None where the model has neither.
        """
        if self.tiny is None:
            colours = mapped(latents, self.spec)
            if colours is None:
                return None
            smooth = F.interpolate(colours[None], scale_factor=PREVIEW_PX, mode="bicubic", align_corners=False)[0]
            return to_uint8(smooth.permute(1, 2, 0).numpy())
        small = thumbnail(latents)
        try:
            pixels, message = attempt(self.tiny.decode, small)
        except NotFiniteError as error:  # a preview is no picture: the render goes on
            pixels, message = None, str(error)
        if pixels is None:
            log.warning("no preview: %s", message)
            return None
        return to_uint8(pixels[0].permute(1, 2, 0).float().cpu().numpy())

    def laid_out(self, x: Tensor) -> Tensor:
        """Maps (B, C, h, w) in the memory format that convolutions run in."""
        return x.contiguous(memory_format=torch.channels_last) if self.device.type == "cpu" else x


def convolutions_last(module: nn.Module, device: torch.device) -> nn.Module:
    """The same module, channels-last on a CPU: for networks of convolutions. A transformer of patches gains nothing."""
    return module.to(memory_format=torch.channels_last) if device.type == "cpu" else module  # type: ignore[call-overload]
