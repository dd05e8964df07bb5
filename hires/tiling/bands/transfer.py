"""Bands between a device and host memory, copied beside the computation.

On a card every copy runs on one stream of its own, in the order it is asked for, so what is fetched has been parked; the
computing stream waits for a fetch only when its rows are taken. Parked maps are pinned and laid out row by row (channels
last), so rows of a single picture are one piece of memory and need no staging copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Arriving:
    """Rows on their way to the device; `take` hands them to the computing stream."""

    rows: Tensor
    ready: torch.cuda.Event | None = None

    def take(self) -> Tensor:
        if self.ready is not None:
            here = torch.cuda.current_stream(self.rows.device)
            here.wait_event(self.ready)
            self.rows.record_stream(here)
        return self.rows


class Copier:
    """Copies for one device. Without a stream of its own (a CPU) a fetch is done when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def park(self, band: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """A copy of a device's tensor in host memory, which may still be arriving there: read it by `fetch` only."""
        if self._stream is None:
            return to_host(band)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            kept = torch.empty(band.shape, dtype=band.dtype, pin_memory=True, memory_format=layout)
            kept.copy_(band, non_blocking=True)
        band.record_stream(self._stream)
        return kept

    def fetch(self, parts: Sequence[Tensor], dtype: torch.dtype, dim: int = 2) -> Arriving:
        """Parts of parked tensors, joined along `dim`, in `dtype` on the device."""
        if self._stream is None:
            return Arriving(self._joined(parts, dtype, dim))
        with torch.cuda.stream(self._stream):
            rows = self._joined(parts, dtype, dim)
            return Arriving(rows, self._stream.record_event())

    def _joined(self, parts: Sequence[Tensor], dtype: torch.dtype, dim: int) -> Tensor:
        # cast on the device: a cast on the way would go through unpinned host memory
        moved = [part.to(self.device, non_blocking=True, copy=True).to(dtype) for part in parts]
        return moved[0] if len(moved) == 1 else torch.cat(moved, dim=dim)


def to_host(band: Tensor) -> Tensor:
    """A tensor in host memory that shares nothing with a larger one."""
    return band.cpu()
