"""Kernels that fuse tiles on a canvas and round finished rows to integers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hires.kernels.backends import Backend, choose, reasons_of
from hires.kernels.group_norm import MapSpec
from hires.kernels.probes import elementwise_why_not

LEVELS = {8: 255, 16: 65535}
INTEGERS = {8: torch.uint8, 16: torch.uint16}


class Accumulate(Protocol):
    """A backend of `blend_accumulate`."""

    def __call__(self, canvas: Tensor, tile: Tensor, rows: Tensor, cols: Tensor, top: int, left: int, /) -> None:
        """Add the weighted tile to the canvas in place."""
        ...


class ToIntegers(Protocol):
    """A backend of `to_integers`."""

    def __call__(self, band: Tensor, bits: int, /) -> Tensor:
        """Rows (3, rows, W) in [-1, 1] as (rows, W, 3) integers."""
        ...


def accumulate_torch(canvas: Tensor, tile: Tensor, rows: Tensor, cols: Tensor, top: int, left: int) -> None:
    """The PyTorch reference of `blend_accumulate`."""
    part = canvas[..., top : top + tile.shape[-2], left : left + tile.shape[-1]]
    part += (rows[:, None] * cols[None, :]) * tile.float()


def to_integers_torch(band: Tensor, bits: int) -> Tensor:
    """The PyTorch reference of `to_integers`."""
    half = LEVELS[bits] / 2
    scaled = (band.float() * half).add_(half).clamp_(0, LEVELS[bits]).add_(0.5)
    whole = scaled.to(torch.int32).to(INTEGERS[bits]) if bits == 16 else scaled.to(torch.uint8)
    return whole.permute(1, 2, 0).contiguous()


def _accumulate_triton(canvas: Tensor, tile: Tensor, rows: Tensor, cols: Tensor, top: int, left: int) -> None:
    from hires.kernels.triton_maps import accumulate_triton

    accumulate_triton(canvas, tile, rows, cols, top, left)


def _to_integers_triton(band: Tensor, bits: int) -> Tensor:
    from hires.kernels.triton_maps import to_integers_triton

    return to_integers_triton(band, bits)


def _torch_why_not(spec: MapSpec) -> str | None:
    return None if spec.dtype.is_floating_point else f"takes floating-point maps, not {spec.dtype}"


def _triton_why_not(spec: MapSpec) -> str | None:
    return elementwise_why_not(spec.device, spec.dtype)


ACCUMULATE: tuple[Backend[MapSpec, Accumulate], ...] = (
    Backend(name="triton", why_not=_triton_why_not, run=_accumulate_triton),
    Backend(name="torch", why_not=_torch_why_not, run=accumulate_torch),
)
TO_INTEGERS: tuple[Backend[MapSpec, ToIntegers], ...] = (
    Backend(name="triton", why_not=_triton_why_not, run=_to_integers_triton),
    Backend(name="torch", why_not=_torch_why_not, run=to_integers_torch),
)


def blend_accumulate(
    canvas: Tensor, tile: Tensor, rows: Tensor, cols: Tensor, top: int, left: int, *, backend: str | None = None
) -> None:
    """canvas[..., top:, left:] += rows ⊗ cols tile, in place. ValueError for a tile that does not lie on the canvas.

    Args:
        canvas: (B, C, h, w) float32.
        tile: (B, C, th, tw), any float dtype and strides.
        rows: weights (th) float32.
        cols: weights (tw) float32.
        top: the tile's first row.
        left: the tile's first column.
        backend: the backend that must run; None chooses one.
    """
    inside = 0 <= top <= canvas.shape[-2] - tile.shape[-2] and 0 <= left <= canvas.shape[-1] - tile.shape[-1]
    if canvas.dtype != torch.float32 or not inside:
        raise ValueError(f"tile {tuple(tile.shape)} at {top}, {left} on a canvas {tuple(canvas.shape)} of {canvas.dtype}")
    spec = MapSpec(device=tile.device.type, dtype=tile.dtype)
    choose(ACCUMULATE, spec, "blend", backend).run(canvas, tile, rows, cols, top, left)


def to_integers(band: Tensor, bits: int = 8, *, backend: str | None = None) -> Tensor:
    """Rows (3, rows, W) in [-1, 1] as (rows, W, 3) uint8 or uint16: (x + 1) / 2 levels, rounded half up and clipped."""
    if bits not in LEVELS:
        raise ValueError(f"{bits} bits: give 8 or 16")
    return choose(TO_INTEGERS, MapSpec(device=band.device.type, dtype=band.dtype), "blend", backend).run(band, bits)


def table(spec: MapSpec) -> list[tuple[str, str | None]]:
    """Every backend with the reason why it cannot run the call; None if it can."""
    return reasons_of(ACCUMULATE, spec)
