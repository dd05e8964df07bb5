"""CosXL-Edit and SDXL InstructPix2Pix: an instruction changes an image that the UNet sees beside the noisy latents."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires.conditioning import Conditioning, sdxl_size_ids
from hires.denoisers import Denoiser, edit_guided
from hires.imageio import fitted
from hires.pipelines.base import LoadedFamily, Parts, convolutions_last, preconditioned, unet_backends
from hires.processors import dispatch_attention
from hires.specs import ModelSpec
from hires.tiling.geometry import Size
from hires.tiling.resize import Padded
from hires.tiling.retry import Ladder
from hires.types import DecodePlan, StagePlan
from hires.unet import UNetNetwork


class CosXLEdit(LoadedFamily):
    """A UNet of 8 input channels and the picture (H, W, 3) uint8 that it changes.

    Every stage sees the picture at its own size: encoded once per canvas, the mean of the posterior, and zeros for the
    estimate without it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: Parts,
        *,
        picture: NDArray[np.uint8],
        device: torch.device,
        dtype: str,
        decode: Ladder[DecodePlan],
    ) -> None:
        super().__init__(spec, parts, device=device, dtype=dtype, decode=decode)
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
