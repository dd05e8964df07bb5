"""What every family gives to the strategies: conditions, a denoiser, and a way between latents and pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hires.conditioning import Conditioning
from hires.denoisers import Denoiser
from hires.errors import BackendError
from hires.kernels.dispatch import BackendRefused, attention
from hires.specs import ModelSpec
from hires.tiling.geometry import Size
from hires.tiling.vae import OnBand, PixelSource, TiledVAE


class Family(Protocol):
    """A loaded model, ready to be run by a strategy."""

    spec: ModelSpec
    device: torch.device
    vae: TiledVAE

    def conditions(self, canvas_px: Size) -> tuple[Conditioning, Conditioning]:
        """Conditional and unconditional conditions for a canvas of that many pixels."""
        ...

    def denoiser(self) -> Denoiser:
        """The preconditioned network."""
        ...

    def decode_bands(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        """Latents (B, C, h, w) to finished rows (B, 3, rows, W) in about [-1, 1], float32 on the CPU, top to bottom."""
        ...

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        """A picture to the posterior's mean, (B, C, h, w) float32 in the scale the sampler works in."""
        ...


@dataclass(frozen=True, slots=True)
class DispatchedAttention:
    """The attention processor of diffusers modules that sends every call through `kernels.dispatch`."""

    backend: str | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, C); encoder_hidden_states (B, M, D) for cross-attention; a mask is additive. temb is unused."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        mask = None if attention_mask is None else attention_mask.reshape(q.shape[0], -1, *attention_mask.shape[1:])
        try:
            out = attention(q, k, v, mask=mask, scale=attn.scale, backend=self.backend)
        except BackendRefused as refusal:
            raise BackendError(str(refusal)) from None
        joined: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return joined


def dispatch_attention(module: nn.Module, backend: str | None = None) -> nn.Module:
    """Send the attention of a diffusers UNet through the dispatch; returns the module."""
    module.set_attn_processor(DispatchedAttention(backend))  # type: ignore[operator]
    return module
