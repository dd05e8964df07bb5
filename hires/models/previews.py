"""Previews latents by one linear map from a cell's channels to its colour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hires.checkpoints.model import ModelSpec
from hires.planning.costs.network_memory import PREVIEW_CELLS

RGB_OF_LATENTS: dict[float, tuple[tuple[float, ...], ...]] = {
    # of SDXL's autoencoder (SDXL, CosXL, PixArt-Sigma): least squares over TAESDXL's latents of five photographs, which
    # explain 89 % of the variance of their 8 x 8 px means
    0.13025: (
        (0.387, 0.379, 0.456),
        (-0.212, -0.018, -0.003),
        (0.070, 0.114, -0.051),
        (-0.240, -0.227, -0.188),
        (0.098, 0.004, -0.079),
    ),
    # of Stable Diffusion 1's (SD1.5, PixArt-alpha): Kevin Turner's fit, huggingface.co forum, topic 23204
    0.18215: (
        (0.298, 0.207, 0.208),
        (0.187, 0.286, 0.173),
        (-0.158, 0.189, 0.264),
        (-0.184, -0.271, -0.473),
        (0.0, 0.0, 0.0),
    ),
}
"""Colours in [-1, 1] per unit of each of four channels, in the scale the sampler works in, and the colour of none; by
`FamilyFacts.latent_scale`."""


def mapped(latents: Tensor, spec: ModelSpec) -> Tensor | None:
    """Latents (1, C, h, w) as colours (3, h', w') in about [-1, 1], at most `PREVIEW_CELLS` a side; None without a map."""
    rows = spec.defaults.latent_rgb or RGB_OF_LATENTS.get(spec.facts.latent_scale)
    if rows is None or len(rows) != latents.shape[1] + 1:
        return None
    small = thumbnail(latents)[0].float().cpu()
    factors = torch.tensor(rows)
    return torch.einsum("chw,cr->rhw", small, factors[:-1]) + factors[-1][:, None, None]


def thumbnail(latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) of the first of a batch, averaged down to `PREVIEW_CELLS` a side at most."""
    factor = -(-max(latents.shape[-2:]) // PREVIEW_CELLS)
    return F.avg_pool2d(latents[:1].float(), factor, ceil_mode=True) if factor > 1 else latents[:1]
