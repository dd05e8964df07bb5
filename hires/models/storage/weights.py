"""Packs weights into 8 or 4 bits and widens them again: int8 and fp8 by output channel, NF4 by blocks of 64.

int8 is symmetric: q = round(W / s), s = max |W| / 127 of a row. fp8 is e4m3fn: q = W / s to nearest, s = max |W| / 448. NF4
(Dettmers et al. 2023, QLoRA) is the nearest of 16 quantiles of a normal distribution, times the largest size in a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.checkpoints.containers.layers import NF4_BLOCK

INT8_LARGEST = 127.0
FP8_LARGEST = 448.0
NF4_CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A packed weight."""

    storage: str
    """int8, fp8 or nf4."""
    codes: Tensor
    """int8 and fp8: int8 or uint8 in the weight's shape. nf4: (blocks, 32) uint8, two codes a byte, the high bits first."""
    scale: Tensor
    """int8 and fp8: (o) float32. nf4: (blocks) bfloat16, the largest size of a block; the last one ends in zeros."""


def packed(weight: Tensor, storage: str) -> Codes:
    """A weight (o, i) or (o, i, kh, kw) in 8 or 4 bits, computed in float32. ValueError for NaN or infinity."""
    values = weight.float()
    if storage == "nf4":
        return _nf4(values)
    largest = values.flatten(1).abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("holds NaN or infinity")
    scale = _positive(largest / (INT8_LARGEST if storage == "int8" else FP8_LARGEST))
    scaled = values / _by_row(scale, values)
    if storage == "int8":
        codes = scaled.round_().clamp_(-INT8_LARGEST, INT8_LARGEST).to(torch.int8)
    else:
        codes = scaled.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return Codes(storage=storage, codes=codes, scale=scale)


def _nf4(values: Tensor) -> Codes:
    flat = values.flatten()
    blocks = F.pad(flat, (0, -flat.numel() % NF4_BLOCK)).reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1).to(torch.bfloat16)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("holds NaN or infinity")
    scale = _positive(scale)
    table = torch.tensor(NF4_CODES)
    nearest = torch.bucketize(blocks / scale.float()[:, None], (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return Codes(storage="nf4", codes=nearest[:, ::2] << 4 | nearest[:, 1::2], scale=scale)


def _positive(scale: Tensor) -> Tensor:
    """The scales, 1 for a run of zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _by_row(scale: Tensor, like: Tensor) -> Tensor:
    """A scale for each row, (o, 1) or (o, 1, 1, 1)."""
    return scale.view(-1, *[1] * (like.ndim - 1))


def widened_codes(weight: Codes, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight in a type that computes: code times scale, rounded to it once. Holds one copy of it, and NF4's indices."""
    if weight.storage == "nf4":
        pairs = nf4_pairs(dtype, weight.codes.device).index_select(0, weight.codes.flatten().int())
        blocks = pairs.view(-1, NF4_BLOCK).mul_(weight.scale[:, None])
        return blocks.flatten()[: shape.numel()].view(shape)
    codes = weight.codes if weight.storage == "int8" else weight.codes.view(torch.float8_e4m3fn)
    return codes.to(dtype).mul_(_by_row(weight.scale, codes))


@functools.lru_cache(maxsize=8)
def nf4_pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of each byte of codes, (256, 2)."""
    table = torch.tensor(NF4_CODES, dtype=dtype, device=device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
