"""A weight that is widened when it is read, and not before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in 8 or 4 bits."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Gives the weight in float32."""


def widened(value: Tensor | Packed) -> Tensor:
    """A tensor as it is, a packed weight in float32."""
    return value.read() if isinstance(value, Packed) else value


def mapped(value: Tensor | Packed, change: Callable[[Tensor], Tensor]) -> Tensor | Packed:
    """A tensor changed now, or a packed weight changed when it is read. change: such as a choice of rows."""
    if not isinstance(value, Packed):
        return change(value)
    shape = tuple(change(torch.empty(value.shape, device="meta")).shape)
    return Packed(shape, lambda: change(value.read()))
