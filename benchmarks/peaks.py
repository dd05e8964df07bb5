"""What a shared machine sustains here and now: its speed changes by half from minute to minute, so rows are held against the
median of what was measured right before and right after them."""

from __future__ import annotations

import torch

from hires.bench.timing import peak_flops


def peaks(dtype: torch.dtype = torch.float32) -> list[float]:
    """FLOP/s of the CPU, three times."""
    return [peak_flops.__wrapped__(torch.device("cpu"), dtype) for _ in range(3)]
