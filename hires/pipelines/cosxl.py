"""CosXL, SDXL and SD1.5 in text-to-image: CLIP towers, a UNet, SDXL's size conditions where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from hires.conditioning import Conditioning, sdxl_size_ids
from hires.denoisers import Denoiser
from hires.device import TORCH_DTYPE
from hires.pipelines.base import LoadedFamily, Parts, convolutions_last, load_parts, preconditioned, unet_backends
from hires.processors import dispatch_attention
from hires.specs import ModelSpec
from hires.tiling.geometry import Size
from hires.tiling.retry import Ladder
from hires.types import DecodePlan, LoraRef
from hires.unet import UNetNetwork


class CosXL(LoadedFamily):
    """A loaded UNet model and the prompts of one request. Text towers are freed before the UNet is loaded."""

    def __init__(
        self,
        spec: ModelSpec,
        prompt: str,
        negative: str,
        *,
        device: torch.device,
        dtype: str,
        decode: Ladder[DecodePlan],
        loras: Sequence[LoraRef] = (),
        parts: Parts | None = None,
    ) -> None:
        parts = parts or load_parts(spec, prompt, negative, device, dtype, decode, loras)
        super().__init__(spec, parts.texts, parts.vae, device=device, dtype=TORCH_DTYPE[dtype], decode=decode)
        self._network = UNetNetwork(convolutions_last(dispatch_attention(parts.network), device), self.dtype)

    def backends(self, tile: Size) -> tuple[tuple[str, str], ...]:
        return unet_backends(self.spec, tile, self.device, self.dtype)

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        return replace(text, size_ids=sdxl_size_ids(canvas_px)) if self.spec.facts.size_conditions else text

    def denoiser(self) -> Denoiser:
        return preconditioned(self.spec, self._network)
