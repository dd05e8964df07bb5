"""Evaluates a half-precision network in float32, for calls that overflowed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WEIGHTED: tuple[Callable[..., Any], ...] = (
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose2d, F.embedding),
    *(F.group_norm, F.layer_norm, F.rms_norm, F.batch_norm),
)  # operations that combine weights and activations


@contextmanager
def in_single(module: nn.Module) -> Iterator[None]:
    """Make every layer of the module compute in float32 inside the block, from weights that are cast for each call.

    Needs more memory than a half-precision run: a float32 copy of the largest layer, and activations of twice the bytes.
    Parts with an attribute `single` have it set to True. Parameters are only read, when they are used, so an offload that
    loads them layer by layer and knows them by identity keeps working.
    """
    halves = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    switched: list[Any] = [part for part in module.modules() if hasattr(part, "single")]
    for part in switched:
        part.single = True
    try:
        with _Widening(halves):
            yield
    finally:
        for part in switched:
            part.single = False


class _Widening(TorchFunctionMode):
    """Casts the arguments of weighted operations to float32; operations between them follow by type promotion."""

    def __init__(self, halves: set[torch.dtype]) -> None:
        super().__init__()
        self.halves = halves

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WEIGHTED:
            wide = {name: self._wide(value) for name, value in (kwargs or {}).items()}
            return func(*(self._wide(value) for value in args), **wide)
        return func(*args, **(kwargs or {}))

    def _wide(self, value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in self.halves else value


def finite_pictures(x: Tensor) -> Tensor:
    """Which pictures (B) of x (B, ...) hold nothing but finite numbers."""
    return torch.isfinite(x).flatten(1).all(1)
