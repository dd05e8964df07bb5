"""A diffusers UNet as a network of the denoisers.

SDXL's with size conditions, SD1.5's without them, and those that see an image to edit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from hires.kernels.attention_policies import Attending, everywhere
from hires.kernels.single_precision import in_single
from hires.sampling.conditioning import Conditioning


class UNetNetwork:
    """Calls the UNet with what the conditions hold; image latents are further input channels, beside the noisy ones.

    unet: its attention goes through `processors.dispatch_attention`. dtype: the UNet's. Maps go in channels-last on a CPU.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        self.unet, self.dtype = unet, dtype
        self._policy: Attending = everywhere

    @contextmanager
    def in_single(self) -> Iterator[None]:
        """Within, the UNet computes in float32 (see `single`)."""
        before, self.dtype = self.dtype, torch.float32
        try:
            with in_single(self.unet):
                yield
        finally:
            self.dtype = before

    def attending(self, policy: Attending) -> Self:
        """The same network, its self-attention by another policy, counted in latent cells."""
        other = copy.copy(self)
        other._policy = policy
        return other

    def __call__(self, x: Tensor, time: float, cond: Conditioning) -> Tensor:
        """X (B, C, h, w) scaled for the network; the result has the UNet's output channels and its dtype."""
        if cond.image_latents is not None:
            x = torch.cat([x, cond.image_latents.to(x)], dim=1)
        x = x.to(self.dtype)
        output: Tensor = self.unet(
            x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x,
            torch.full((x.shape[0],), time, device=x.device),
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.mask,
            timestep_cond=cond.guidance,
            added_cond_kwargs=self._added(cond),
            cross_attention_kwargs={"canvas": (x.shape[-2], x.shape[-1]), "policy": self._policy(time)},
            return_dict=False,
        )[0]
        return output

    def _added(self, cond: Conditioning) -> dict[str, Tensor | None] | None:
        if cond.size_ids is None:
            return None
        return {"text_embeds": cond.pooled, "time_ids": cond.size_ids}
