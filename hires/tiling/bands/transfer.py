"""Copies bands between a device and host memory while the device computes.

On a card all copies run in order on one separate stream, so a band is fetched only after it was parked. The computing stream
waits for a fetch only when its rows are taken. Parked maps are pinned and stored row by row (channels last), so rows of a
single picture are contiguous and need no staging copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Arriving:
    """Rows on their way to the device."""

    rows: Tensor
    """The rows; valid once `ready` has passed."""
    ready: torch.cuda.Event | None = None
    """Recorded after the copy; None where the copy is done already."""

    def take(self) -> Tensor:
        """The rows; makes the current stream wait for the copy."""
        if self.ready is not None:
            here = torch.cuda.current_stream(self.rows.device)
            here.wait_event(self.ready)
            self.rows.record_stream(here)
        return self.rows


class Copier:
    """Copies for one device. On a CPU there is no second stream and every copy finishes at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def park(self, band: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        """A copy of a device tensor in host memory. It may still be arriving: read it by `fetch` only."""
        if self._stream is None:
            return to_host(band)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            parked = torch.empty(band.shape, dtype=band.dtype, pin_memory=True, memory_format=layout)
            parked.copy_(band, non_blocking=True)
        band.record_stream(self._stream)
        return parked

    def fetch(self, parts: Sequence[Tensor], dtype: torch.dtype, dim: int = 2) -> Arriving:
        """Parts of parked tensors, concatenated along `dim`, in `dtype` on the device."""
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
    """A copy in host memory that does not keep a larger tensor alive."""
    return band.cpu()
