"""CosXL-Edit and SDXL InstructPix2Pix: an instruction changes an image that the UNet sees beside the noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.conditioning import Conditioning, sdxl_size_ids
from hires.denoisers import Denoiser, edit_guided
from hires.device import TORCH_DTYPE
from hires.imageio import fitted
from hires.pipelines.base import LoadedFamily, Parts, convolutions_last, load_parts, preconditioned, unet_backends
from hires.processors import dispatch_attention
from hires.specs import ModelSpec
from hires.tiling.geometry import Size
from hires.tiling.resize import Padded
from hires.tiling.retry import Ladder
from hires.types import DecodePlan, LoraRef, StagePlan
from hires.unet import UNetNetwork


class CosXLEdit(LoadedFamily):
    """A loaded 8-channel model, one instruction and the image (H, W, 3) uint8 that it changes.

    Every stage sees the image at its own size: encoded once per canvas, the mean of the posterior, and in zeros for the
    estimate without it. parts: already loaded, in place of the checkpoint's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        prompt: str,
        negative: str,
        *,
        device: torch.device,
        dtype: str,
        decode: Ladder[DecodePlan],
        picture: NDArray[np.uint8],
        loras: Sequence[LoraRef] = (),
        parts: Parts | None = None,
    ) -> None:
        parts = parts or load_parts(spec, prompt, negative, device, dtype, decode, loras)
        super().__init__(spec, parts.texts, parts.vae, device=device, dtype=TORCH_DTYPE[dtype], decode=decode)
        self._network = UNetNetwork(convolutions_last(dispatch_attention(parts.network), device), self.dtype)
        self.picture = picture
        self._image_at = lru_cache(maxsize=1)(self._encoded)

    def backends(self, tile: Size) -> tuple[tuple[str, str], ...]:
        return unet_backends(self.spec, tile, self.device, self.dtype)

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        return replace(text, size_ids=sdxl_size_ids(canvas_px))

    def denoiser(self) -> Denoiser:
        return preconditioned(self.spec, self._network)

    def guided(self, on_canvas: Denoiser, stage: StagePlan) -> tuple[Denoiser, Conditioning]:
        """Guidance by text and by image on the canvas: three estimates (Brooks et al. 2023)."""
        conditional, unconditional = self.conditions(stage.canvas)
        image = self._image_at(stage.canvas)
        with_image = replace(unconditional, image_latents=image)
        without = replace(unconditional, image_latents=torch.zeros_like(image))
        guide = edit_guided(on_canvas, with_image, without, stage.guidance, stage.image_guidance)
        return guide, replace(conditional, image_latents=image)

    def _encoded(self, canvas: Size) -> Tensor:
        """The image's latents at a canvas; CosXL-Edit's are scaled like those it denoises, InstructPix2Pix's are not."""
        with torch.inference_mode():
            latents = self.encode(Padded(fitted(self.picture, canvas), canvas), lambda done, total: None)
        scale = 1.0 if self.spec.facts.image_scaled else 1 / self.spec.latent_scale
        return (latents * scale).to(self.device, self.dtype)
