"""What a shared machine sustains here and now: its speed changes by half from minute to minute, so rows are held against the
median of what was measured right before and right after them."""

from __future__ import annotations

import torch

from hires.bench.timing import peak_flops


def peaks(dtype: torch.dtype = torch.float32, times: int = 3) -> list[float]:
    """FLOP/s of the CPU, `times` measurements of one and a half seconds."""
    return [peak_flops.__wrapped__(torch.device("cpu"), dtype) for _ in range(times)]
