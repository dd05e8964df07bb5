"""What every family gives to the strategies: conditions, a denoiser, and a way between latents and pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hires.conditioning import Conditioning
from hires.denoisers import Denoiser
from hires.device import TORCH_DTYPE
from hires.specs import ModelSpec
from hires.tiling.geometry import Size
from hires.tiling.retry import Ladder
from hires.tiling.vae import OnBand, PixelSource, TiledVAE
from hires.types import DecodePlan


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


class LoadedFamily:
    """A spec, the prompts of one request and an autoencoder: what does not depend on the kind of network.

    texts: the conditions of the prompt and of the negative prompt. Convolutions run channels-last on a CPU.
    """

    def __init__(
        self,
        spec: ModelSpec,
        texts: Sequence[Conditioning],
        vae: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype,
        decode: Ladder[DecodePlan],
    ) -> None:
        self.spec, self.device, self.dtype = spec, device, dtype
        self._texts, self._vae_dtype = texts, TORCH_DTYPE[decode.rung.dtype]
        self.vae = TiledVAE(convolutions_last(vae, device), ladder=decode)

    def conditions(self, canvas_px: Size) -> tuple[Conditioning, Conditioning]:
        conditional, unconditional = (self.sized(text, canvas_px).to(self.device, self.dtype) for text in self._texts)
        return conditional, unconditional

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        """A prompt's conditions with what the network is told of a canvas of that many pixels."""
        raise NotImplementedError

    def decode_bands(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        scaled = (latents / self.spec.latent_scale).to(self.device, self._vae_dtype)
        for rows in self.vae.decode_bands(self.laid_out(scaled), on_band):
            yield rows.float().cpu()

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        return self.vae.encode(source, on_band).float() * self.spec.latent_scale

    def laid_out(self, x: Tensor) -> Tensor:
        """Maps (B, C, h, w) in the memory format that convolutions run in."""
        return x.contiguous(memory_format=torch.channels_last) if self.device.type == "cpu" else x


def convolutions_last(module: nn.Module, device: torch.device) -> nn.Module:
    """The same module, channels-last on a CPU: for networks of convolutions. A transformer of patches gains nothing."""
    return module.to(memory_format=torch.channels_last) if device.type == "cpu" else module  # type: ignore[call-overload]
