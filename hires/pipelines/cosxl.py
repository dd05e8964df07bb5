"""CosXL and SDXL in text-to-image: two CLIP towers, a UNet with size conditions, an AutoencoderKL."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hires.conditioning import Conditioning, sdxl_size_ids
from hires.denoisers import Denoiser, Network, edm_v, eps
from hires.device import TORCH_DTYPE
from hires.families import UNetShape
from hires.kernels.dispatch import AttentionSpec, select
from hires.pipelines.base import LoadedFamily, convolutions_last
from hires.processors import dispatch_attention
from hires.specs import ModelSpec, vp_sigmas
from hires.text import encode_prompts
from hires.tiling.geometry import Size
from hires.tiling.retry import Ladder
from hires.types import DecodePlan
from hires.weights import load_unet, load_vae


class CosXL(LoadedFamily):
    """A loaded CosXL or SDXL folder and the prompts of one request. Text towers are freed before the UNet is loaded."""

    def __init__(
        self, spec: ModelSpec, prompt: str, negative: str, *, device: torch.device, dtype: str, decode: Ladder[DecodePlan]
    ) -> None:
        network_dtype, vae_dtype = TORCH_DTYPE[dtype], TORCH_DTYPE[decode.rung.dtype]
        texts = encode_prompts(spec.path, [prompt, negative], network_dtype, device, spec.cell_px)
        unet = dispatch_attention(load_unet(spec.path, network_dtype, device))
        vae = load_vae(spec.path, vae_dtype, device)
        super().__init__(spec, texts, vae, device=device, dtype=network_dtype, decode=decode)
        self._unet = convolutions_last(unet, device)

    def backends(self, tile: Size) -> tuple[tuple[str, str], ...]:
        """Which attention backend runs the widest self-attention of a tile (in cells), by the dispatch's own rule."""
        assert isinstance(self.spec.network, UNetShape)
        level = next((i for i, layers in enumerate(self.spec.network.transformer_layers) if layers), 0)
        tokens = (tile.height >> level) * (tile.width >> level)
        spec = AttentionSpec(device=self.device.type, dtype=self.dtype, head_dim=64, queries=tokens, keys=tokens, masked=False)
        return (("attention", select(spec).name),)

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        return replace(text, size_ids=sdxl_size_ids(canvas_px))

    def denoiser(self) -> Denoiser:
        if self.spec.vp_betas is None:
            return edm_v(self._network())
        return eps(self._network(), vp_sigmas(*self.spec.vp_betas))

    def _network(self) -> Network:
        def network(x: Tensor, time: float, cond: Conditioning) -> Tensor:
            output: Tensor = self._unet(
                self.laid_out(x.to(self.dtype)),
                torch.full((x.shape[0],), time, device=x.device),
                encoder_hidden_states=cond.tokens,
                encoder_attention_mask=cond.mask,
                added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.size_ids},
                return_dict=False,
            )[0]
            return output

        return network
