"""Measures a call's seconds in quantiles, its peak bytes, and the machine's peaks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from hires.kernels.backends import BackendRefused
from hires.tiling.retry import free_memory, is_out_of_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """Quantiles of a call's seconds after a warm-up, or no numbers and the reason."""

    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    repeats: int = 0
    """How many calls the quantiles are of."""
    peak_bytes: int = 0
    """Bytes allocated beyond those held before; 0 where unknown."""
    state: str = "ran"
    """Why there are no numbers: out of memory, refused: …, skipped: …; empty otherwise."""


def timed(run: Callable[[], object], device: torch.device, *, least: int = 3, most: int = 50, seconds: float = 2.0) -> Timed:
    """Call until `seconds` are over, at least `least` and at most `most` times. Out of memory and refusals are values."""
    try:
        peak = _peak_of(run, device)
        taken: list[float] = []
        while len(taken) < least or (sum(taken) < seconds and len(taken) < most):
            taken.append(_once(run, device))
    except BackendRefused as refusal:
        return Timed(state=f"refused: {refusal}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        low, middle, high = (quantile(taken, share) for share in (0.2, 0.5, 0.8))
        return Timed(p20=low, p50=middle, p80=high, repeats=len(taken), peak_bytes=peak)
    free_memory()
    return Timed(state="out of memory")


def quantile(values: list[float], share: float) -> float:
    """By linear interpolation between order statistics."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    event: Any = torch.cuda.Event
    with torch.cuda.device(device):  # events are of the current device's stream
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1000


def _peak_of(run: Callable[[], object], device: torch.device) -> int:
    """The warm-up call, with the bytes that it allocated at most; a CPU's allocator does not tell."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - held


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product or of a 3x3 convolution, whichever is faster, the best of a few."""
    cuda = device.type == "cuda"
    side = 8192 if cuda else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    batch, channels, extent = (8, 640, 128) if cuda else (1, 256, 64)
    x = torch.randn(batch, channels, extent, extent, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def product() -> object:
        return a @ b

    def convolution() -> object:
        return functional.conv2d(x, weight, padding=1)

    works = ((2.0 * side**3, product), (18.0 * batch * channels**2 * extent**2, convolution))
    with torch.inference_mode():
        return max(flops / min(_once(run, device) for _ in range(6)) for flops, run in works)


@functools.cache
def peak_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for any cache, the best of a few."""
    count = 2**30 if device.type == "cuda" else 2**27
    a = torch.ones(count, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2.0 * count / min(_once(lambda: b.copy_(a), device) for _ in range(5))


def rms(values: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error over that of the exact values."""
    difference = (values.double() - exact.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt().clamp_min(1e-30))
