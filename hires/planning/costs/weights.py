"""Bytes of weights in the type that computes, or packed in 8 or 4 bits. No torch."""

from __future__ import annotations

from hires.checkpoints.containers.layers import NF4_BLOCK, LayerCount

VAE_STORAGE = "int8"
"""What the VAE is packed in, whatever `weights` is: its rounding shows in every pixel, and it has few bytes. The shipped model
at 1024² against float32: 27 dB with both in NF4, 39 dB with the network in NF4 and the VAE in int8."""
SCALE_BYTES = 4
"""Of the scale of an output channel, float32."""
BLOCK_BYTES = NF4_BLOCK // 2 + 2
"""Of a block of NF4: two codes a byte, and the largest size in bfloat16."""
INDEX_BYTES = 2
"""A value's share of the 32-bit indices by which NF4's codes are looked up, two at a time."""


def storage_of(weights: str | None, component: str) -> str | None:
    """How the 'network' or the 'vae' is packed where `weights` is asked for; None for the type that computes."""
    return VAE_STORAGE if weights is not None and component == "vae" else weights


def stored_bytes(count: LayerCount, storage: str | None, element: int) -> int:
    """Bytes of all weights, scales included; what is not packed takes `element` bytes a value."""
    if storage is None:
        return count.values * element
    packed = count.blocks * BLOCK_BYTES if storage == "nf4" else count.packable + count.rows * SCALE_BYTES
    return packed + (count.values - count.packable) * element


def widening_bytes(count: LayerCount, storage: str | None, element: int) -> int:
    """Bytes that the largest packed layer takes while it computes: its weight in the type that computes."""
    if storage is None:
        return 0
    return count.largest * (element + (INDEX_BYTES if storage == "nf4" else 0))
