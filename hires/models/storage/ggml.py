"""Weights in ggml's blocks, by the `gguf` package."""

from __future__ import annotations

import torch
from torch import Tensor

from hires.errors import ModelError


def dequantised(codes: Tensor, kind: int, shape: tuple[int, ...]) -> Tensor:
    """A weight in float32. codes: its bytes, uint8; kind: ggml's number of the type. ModelError without the package."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise ModelError("a quantised .gguf needs the package gguf: pip install -e '.[gguf]' in the folder of hires") from None
    values = dequantize(codes.numpy(), GGMLQuantizationType(kind))
    return torch.from_numpy(values).reshape(shape)
