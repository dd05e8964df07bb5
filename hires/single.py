"""A half-precision network evaluated in float32, layer by layer: what overflows in half precision is done again so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def in_single(module: nn.Module) -> Iterator[None]:
    """Within, every layer of the module computes in float32 from its own weights, which are cast for the call and dropped.

    More memory than a half-precision run by the float32 copy of the largest layer, and by activations of twice the bytes.
    """
    hooks: list[Any] = []
    told: list[Any] = [part for part in module.modules() if hasattr(part, "single")]
    for part in told:
        part.single = True
    for layer in module.modules():
        if any(p.is_floating_point() for p in layer.parameters(recurse=False)) and not any(True for _ in layer.children()):
            hooks.append(layer.register_forward_pre_hook(_widen, with_kwargs=True))
            hooks.append(layer.register_forward_hook(_restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in told:
            part.single = False


def _widen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kept = {name: p for name, p in layer._parameters.items() if p is not None and p.is_floating_point()}
    layer._kept_parameters = kept  # type: ignore[assignment]
    for name, p in kept.items():
        layer._parameters[name] = nn.Parameter(p.detach().float(), requires_grad=False)
    return tuple(_wide(value) for value in args), {name: _wide(value) for name, value in kwargs.items()}


def _restore(layer: nn.Module, args: Any, output: Any) -> None:
    layer._parameters.update(layer.__dict__.pop("_kept_parameters", {}))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def finite_pictures(x: Tensor) -> Tensor:
    """Which pictures (B) of x (B, ...) hold nothing but finite numbers."""
    return torch.isfinite(x).flatten(1).all(1)
