"""Networks whose answer is known."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hires.models.upscalers import UpscalerNetwork
from hires.tiling.reach import Halo

CPU = torch.device("cpu")


def nearest(scale: int = 2, channels: int = 3) -> UpscalerNetwork:
    """A network with a known answer: every pixel repeated."""
    return UpscalerNetwork(
        name="nearest", architecture="none", network=lambda x: F.interpolate(x, scale_factor=scale), scale=scale,
        channels=channels, multiple=1, halo=Halo(pixels=0, reach=0, error=0.0), whole=False, device=CPU, dtype=torch.float32,
    )  # fmt: skip
