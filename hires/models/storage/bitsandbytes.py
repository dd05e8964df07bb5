"""Weights that bitsandbytes packed: NF4 and FP4 in blocks, int8 by rows. Own code, so that nothing more is installed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

INT8_LARGEST = 127


def int8(codes: Tensor, largest: Tensor) -> Tensor:
    """W = q SCB / 127 in float32. codes: (o, i) int8; largest: SCB (o), the largest size of each row."""
    return codes.float() * (largest.float() / INT8_LARGEST)[:, None]


def four_bit(parts: Mapping[str, Tensor], values: Mapping[str, float], shape: tuple[int, ...]) -> Tensor:
    """W = map[code] absmax[block] in float32; the high four bits of a byte come first.

    parts: codes (n / 2, 1) uint8, quant_map (16), absmax, of which in 8 bits with nested_absmax and nested_quant_map
    absmax = nested_map[a] nested_absmax[i / nested_blocksize] + nested_offset. values: the block sizes and the offset.
    """
    codes = parts["codes"].flatten()
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[: math.prod(shape)]
    weights = parts["quant_map"].float()[nibbles.long()]
    blocks = _absmax(parts, values).repeat_interleave(int(values.get("blocksize", 64)))[: weights.numel()]
    return (weights * blocks).reshape(shape)


def _absmax(parts: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
    """The scale of each block in float32."""
    absmax = parts["absmax"].flatten()
    if "nested_absmax" not in parts:
        return absmax.float()
    sizes = parts["nested_absmax"].float().flatten().repeat_interleave(int(values.get("nested_blocksize", 256)))
    return parts["nested_quant_map"].float()[absmax.long()] * sizes[: absmax.numel()] + values.get("nested_offset", 0.0)
