"""Counts a network's weights: what `weights` keeps in 8 or 4 bits, and what stays. Imports no torch.

A rule of shapes alone, so that the header of a file and the loaded modules, under whatever names, agree to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

NF4_BLOCK = 64
"""Weights that share a scale in NF4 (Dettmers et al. 2023, QLoRA)."""
KEPT_CHANNELS = 32
"""Layers with so few channels at either end keep their type: the first and the last one, depth-wise convolutions."""


def is_packable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight (o, i) or (o, i, kh, kw) of a linear layer or a convolution that `weights` packs."""
    return name.endswith(".weight") and len(shape) in (2, 4) and min(shape[:2]) > KEPT_CHANNELS


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCount:
    """What decides the bytes of a network's weights in any storage."""

    values: int = 0
    """Values of all tensors."""
    packable: int = 0
    """Those of them in weights that `weights` packs."""
    rows: int = 0
    """Output channels of these."""
    blocks: int = 0
    """Runs of `NF4_BLOCK` values of these, the last of each tensor filled up."""
    largest: int = 0
    """Values of the largest of these."""

    def __add__(self, other: LayerCount) -> LayerCount:
        """The count of both together."""
        return LayerCount(
            values=self.values + other.values,
            packable=self.packable + other.packable,
            rows=self.rows + other.rows,
            blocks=self.blocks + other.blocks,
            largest=max(self.largest, other.largest),
        )


NOT_COUNTED = LayerCount()


def count_layers(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> LayerCount:
    """The count of tensors by name and shape."""
    values = packable = rows = blocks = largest = 0
    for name, shape in shapes:
        count = math.prod(shape)
        values += count
        if is_packable(name, shape):
            packable, rows, largest = packable + count, rows + shape[0], max(largest, count)
            blocks += -(-count // NF4_BLOCK)
    return LayerCount(values=values, packable=packable, rows=rows, blocks=blocks, largest=largest)
