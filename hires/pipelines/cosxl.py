"""CosXL and SDXL in text-to-image: two CLIP towers, a UNet with size conditions, an AutoencoderKL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hires.conditioning import Conditioning, sdxl_size_ids
from hires.denoisers import Denoiser, Network, edm_v, eps
from hires.device import TORCH_DTYPE
from hires.families import UNetShape
from hires.kernels.dispatch import AttentionSpec, select
from hires.pipelines.base import dispatch_attention
from hires.specs import ModelSpec, vp_sigmas
from hires.text import encode_prompts
from hires.tiling.geometry import Size
from hires.tiling.retry import Ladder
from hires.tiling.vae import OnBand, PixelSource, TiledVAE
from hires.types import DecodePlan, LoraRef
from hires.weights import load_network, load_vae


class CosXL:
    """A loaded CosXL or SDXL folder and the prompts of one request. Text towers are freed before the UNet is loaded."""

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
    ) -> None:
        self.spec, self.device = spec, device
        self._dtype, self._vae_dtype = TORCH_DTYPE[dtype], TORCH_DTYPE[decode.rung.dtype]
        self._texts = encode_prompts(spec, [prompt, negative], self._dtype, device, loras)
        self._unet = dispatch_attention(load_network(spec, self._dtype, device, loras))
        vae = load_vae(spec, self._vae_dtype, device)
        if device.type == "cpu":
            for module in (self._unet, vae):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.vae = TiledVAE(vae, ladder=decode)

    def backends(self, tile: Size) -> tuple[tuple[str, str], ...]:
        """Which attention backend runs the widest self-attention of a tile (in cells), by the dispatch's own rule."""
        assert isinstance(self.spec.network, UNetShape)
        level = next((i for i, layers in enumerate(self.spec.network.transformer_layers) if layers), 0)
        tokens = (tile.height >> level) * (tile.width >> level)
        spec = AttentionSpec(device=self.device.type, dtype=self._dtype, head_dim=64, queries=tokens, keys=tokens, masked=False)
        return (("attention", select(spec).name),)

    def conditions(self, canvas_px: Size) -> tuple[Conditioning, Conditioning]:
        ids = sdxl_size_ids(canvas_px).to(self.device)
        conditional, unconditional = (replace(text, size_ids=ids).to(self.device, self._dtype) for text in self._texts)
        return conditional, unconditional

    def denoiser(self) -> Denoiser:
        if self.spec.vp_betas is None:
            return edm_v(self._network())
        return eps(self._network(), vp_sigmas(*self.spec.vp_betas))

    def _network(self) -> Network:
        def network(x: Tensor, time: float, cond: Conditioning) -> Tensor:
            output: Tensor = self._unet(
                self._laid_out(x.to(self._dtype)),
                torch.full((x.shape[0],), time, device=x.device),
                encoder_hidden_states=cond.tokens,
                encoder_attention_mask=cond.mask,
                added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.size_ids},
                return_dict=False,
            )[0]
            return output

        return network

    def decode_bands(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        scaled = (latents / self.spec.latent_scale).to(self.device, self._vae_dtype)
        for rows in self.vae.decode_bands(self._laid_out(scaled), on_band):
            yield rows.float().cpu()

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        return self.vae.encode(source, on_band).float() * self.spec.latent_scale

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.device.type == "cpu" else x
