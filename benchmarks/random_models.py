"""CosXL and PixArt-Σ with random weights, at full size or as toys: shapes, bytes and seconds need no training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.full_size import full_spec
from hires._imports import quiet_imports
from hires.checkpoints.configs import shipped_config
from hires.checkpoints.families import PixArtShape
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import unet_shape
from hires.devices.probe import TORCH_DTYPE
from hires.models.loading import Home
from hires.models.text_encoders import TextEncoders
from hires.sampling.conditioning import Conditioning
from hires.tiling.bands.memory import VaeShape

FAMILIES = ("cosxl", "pixart-sigma-1024")
TOY_PX = 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOY_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16, "norm_num_groups": 8, "cross_attention_dim": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4), "transformer_layers_per_block": 1, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
TOY_PIXART = PixArtShape(layers=2, heads=2, head_dim=12, patch=2, caption_width=32, latent_channels=4)
TOY_VAE = VaeShape(channels=(16, 16, 32, 32), resnets=1, latent_channels=4, mid_attention=True)
WEIGHT = 0.02  # standard deviation of random weights: values stay finite in half precision


@lru_cache
def spec_of(family: str, toy: bool) -> ModelSpec:
    """The facts of a family, for a toy with its shapes."""
    spec = full_spec(family)
    if not toy:
        return spec
    pixart = spec.facts.network == "pixart"
    common: dict[str, Any] = {
        "native_px": TOY_PX,
        "align_px": 32,
        "vae": TOY_VAE,
        "network_params": 500_000,
        "text_params": 1000,
    }
    defaults = replace(spec.defaults, tile_px=TOY_PX, overlap_px=TOY_PX // 4, steps=3, relay_steps=(2,))
    shape = TOY_PIXART if pixart else unet_shape(TOY_UNET, spec.facts)
    return replace(spec, **common, vae_params=500_000, defaults=defaults, network=shape)


def network_of(family: str, toy: bool, dtype: str, device: torch.device) -> nn.Module:
    """The network with random weights, made on its device."""
    with quiet_imports():
        from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
    with made_in(dtype, device):
        if family == "cosxl":
            config = TOY_UNET if toy else json.loads(shipped_config("sdxl", "unet").read_text())
            return finished(UNet2DConditionModel.from_config(config))
        options = {"num_layers": 28, "caption_channels": 4096, "sample_size": 128}
        if toy:
            options = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
                       "caption_channels": 32, "sample_size": 16}  # fmt: skip
        return finished(PixArtTransformer2DModel(**options, use_additional_conditions=False))


def vae_of(toy: bool, dtype: str, device: torch.device) -> nn.Module:
    """The SDXL autoencoder with random weights, or one of its kind that is small."""
    with quiet_imports():
        from diffusers import AutoencoderKL
    shape = TOY_VAE if toy else VaeShape(channels=(128, 256, 512, 512), resnets=2, latent_channels=4, mid_attention=True)
    with made_in(dtype, device):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=shape.channels, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=shape.resnets, sample_size=1024,
            norm_num_groups=8 if toy else 32,
        )  # fmt: skip
        made: nn.Module = vae.eval().requires_grad_(False)
        return made


@contextmanager
def made_in(dtype: str, device: torch.device) -> Iterator[None]:
    """Modules made within are of a type and on a device."""
    torch.set_default_dtype(DTYPES[dtype])
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def finished(network: nn.Module) -> nn.Module:
    """Weights drawn anew, small, so that a deep network neither vanishes nor overflows."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, WEIGHT, generator=generator)
    return network.eval().requires_grad_(False)


def texts_of(family: str, toy: bool, dtype: str, device: torch.device) -> tuple[Conditioning, Conditioning]:
    """Conditions of a prompt and of none, as the text towers would give."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[1])).to(device, DTYPES[dtype])

    width = 32 if toy else 2048 if family == "cosxl" else 4096
    if family == "cosxl":
        pooled = 32 if toy else 1280
        return tuple(Conditioning(tokens=sign * drawn(1, 77, width), pooled=sign * drawn(1, pooled)) for sign in (1, -1))  # type: ignore[return-value]
    masks = (torch.arange(300, device=device)[None] < words for words in (60, 1))
    return tuple(Conditioning(tokens=drawn(1, 300, width), mask=mask) for mask in masks)  # type: ignore[return-value]


@contextmanager
def random_weights(family: str, toy: bool) -> Iterator[None]:
    """Within, renders load no files: every part has random weights, on the device and in the type that are asked for."""

    def encode(encoders: TextEncoders, prompts: Sequence[str]) -> list[Conditioning]:
        return list(texts_of(family, toy, "fp32", encoders.device))

    def loaded(spec: ModelSpec, homes: Mapping[str, Home], loras: object) -> Any:
        names = {kind: name for name, kind in TORCH_DTYPE.items()}
        network, vae = homes["network"], homes["vae"]
        return network_of(family, toy, names[network.dtype], network.device), (), vae_of(toy, names[vae.dtype], vae.device)

    with mock.patch("hires.pipelines.load.encode", encode), mock.patch("hires.pipelines.load._loaded", loaded):
        yield
