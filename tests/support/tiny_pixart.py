"""A tiny random PixArt transformer, prompts for it, and the spec of its family with shapes to match."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import PixArtTransformer2DModel

from hires.checkpoints.families import FAMILIES, PixArtShape
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.noise_levels import vp_sigmas
from hires.sampling.conditioning import Conditioning
from hires.tiling.geometry import Size

LAYERS, HEADS, HEAD_DIM, CAPTION = 2, 2, 12, 32


def transformer(sample_size: int, interpolation: float, *, sized: bool = False, seed: int = 0) -> PixArtTransformer2DModel:
    """Native at `sample_size` cells per side; `sized`: conditioned on the resolution."""
    torch.manual_seed(seed)
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HEADS * HEAD_DIM,
        num_layers=LAYERS,
        caption_channels=CAPTION,
        sample_size=sample_size,
        interpolation_scale=interpolation,  # type: ignore[arg-type]
        use_additional_conditions=sized,
    ).eval()


def prompt(words: int, length: int, seed: int, canvas: Size | None = None) -> Conditioning:
    """A prompt of so many words, padded to `length`; what stands in the padding is noise, and must not matter."""
    tokens = torch.randn(1, length, CAPTION, generator=torch.Generator().manual_seed(seed))
    return Conditioning(tokens=tokens, mask=torch.arange(length)[None] < words, canvas=canvas)


def latents(h: int, w: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(seed + 1000 * h + w))


def spec(demo: ModelSpec, family: str) -> ModelSpec:
    """The spec of a PixArt family around the tiny transformer and the shipped autoencoder."""
    facts = FAMILIES[family]
    assert facts.betas is not None
    sigmas = vp_sigmas(*facts.betas)
    return replace(
        demo,
        name=family,
        facts=facts,
        parameterisation="eps",
        sigma_min=sigmas[0],
        sigma_max=sigmas[-1],
        vp_betas=facts.betas,
        native_px=facts.native_px,
        align_px=16,
        network=PixArtShape(layers=LAYERS, heads=HEADS, head_dim=HEAD_DIM, patch=2, caption_width=CAPTION, latent_channels=4),
        network_params=50_000,
        defaults=facts.defaults,
    )
