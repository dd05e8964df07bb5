"""A half-precision network evaluated in float32, layer by layer: what overflows in half precision is done again so."""

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
)  # by which weights meet activations


@contextmanager
def in_single(module: nn.Module) -> Iterator[None]:
    """Within, every layer of the module computes in float32 from its own weights, which are cast for the call and dropped.

    More memory than a half-precision run by the float32 copy of the largest layer, and by activations of twice the bytes.
    Parts that have a `single` of their own are told. Parameters are only read, at the moment that they are used: an offload
    that fetches them layer by layer and knows them by identity goes on undisturbed.
    """
    halves = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32, torch.float64}
    told: list[Any] = [part for part in module.modules() if hasattr(part, "single")]
    for part in told:
        part.single = True
    try:
        with _Widening(halves):
            yield
    finally:
        for part in told:
            part.single = False


class _Widening(TorchFunctionMode):
    """Arguments of weighted operations in float32; what is between them follows by promotion."""

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
