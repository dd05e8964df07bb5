"""Measures once what this machine sustains, so that plans know its speed.

It takes less than two minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from hires.bench.timing import timed
from hires.devices.calibration import Calibration
from hires.devices.probe import probe
from hires.errors import RunError
from hires.kernels.dispatch import BACKENDS, AttentionSpec, attention

SECONDS = 3.0  # for each thing that is measured
Say = Callable[[str], None]


def calibrate(device: torch.device, say: Say = lambda line: None) -> Calibration:
    """The rates of a device: convolutions as a UNet has them, attention by its fastest backend, copies, starts, slack."""
    facts = probe(device)
    dtype = torch.bfloat16 if facts.kind == "cuda" and facts.bf16 else torch.float32
    flops = convolution_rate(device, dtype)
    say(f"convolutions        {flops / 1e12:10.3f} TFLOP/s")
    rates = {name: rate for name, rate in attention_rates(device, dtype) if rate}
    for name, rate in rates.items():
        say(f"attention, {name:<9}{rate / 1e12:10.3f} TFLOP/s")
    best = max(rates, key=lambda name: rates[name])
    copies = copy_rate(device)
    say(f"copies              {copies / 1e9:10.2f} GB/s" if copies else "copies              the same memory")
    call, slack = call_seconds(device, dtype), allocator_slack(device)
    say(f"starting a network  {call * 1000:10.2f} ms")
    say(f"allocator's slack   {slack:10.1%}")
    return Calibration(
        device=facts.name,
        flops=flops,
        attention_flops=rates[best],
        copy_bytes_per_second=copies,
        call_seconds=call,
        slack=slack,
        attention_backend=best,
    )


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The median of calls for about `SECONDS`, after one to warm up. RunError where they run out of memory."""
    taken = timed(run, device, most=200, seconds=SECONDS)
    if taken.p50 is None:
        raise RunError(f"calibrate: {taken.state}; close what else uses the device")
    return taken.p50


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of 3x3 convolutions over the maps of a native picture, the work of a UNet and of an autoencoder."""
    cuda = device.type == "cuda"
    batch, channels, side = (8, 640, 64) if cuda else (4, 128, 32)
    layout = torch.contiguous_format if cuda else torch.channels_last
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=layout)
    with torch.inference_mode():
        return 2.0 * 9 * batch * channels**2 * side**2 / seconds_of(lambda: F.conv2d(x, weight, padding=1), device)


def attention_rates(device: torch.device, dtype: torch.dtype) -> list[tuple[str, float | None]]:
    """FLOP/s of self-attention by every backend, None where it cannot run or is left out: what holds all scores."""
    tokens = 4096 if device.type == "cuda" else 1024
    q = torch.randn(1, 10, tokens, 64, device=device, dtype=dtype)
    spec = AttentionSpec(device=device.type, dtype=dtype, head_dim=64, queries=tokens, keys=tokens, masked=False)
    results: list[tuple[str, float | None]] = []
    for backend in BACKENDS:
        if backend.why_not(spec) is not None or backend.name == "math":
            results.append((backend.name, None))
            continue
        name = backend.name
        with torch.inference_mode():
            taken = seconds_of(lambda name=name: attention(q, q, q, backend=name), device)  # type: ignore[misc]
        results.append((name, 4.0 * 10 * 64 * tokens**2 / taken))
    return results


def copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned host memory to the device; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    host, there = torch.empty(2**28, dtype=torch.uint8, pin_memory=True), torch.empty(2**28, dtype=torch.uint8, device=device)
    return 2.0**28 / seconds_of(lambda: there.copy_(host, non_blocking=True), device)


def call_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """What an evaluation takes that computes next to nothing: as many small operators as a UNet has layers."""
    x, weight = torch.ones(1, 8, device=device, dtype=dtype), torch.ones(8, 8, device=device, dtype=dtype)

    def start() -> None:
        for _ in range(1000):
            F.linear(x, weight)

    with torch.inference_mode():
        return seconds_of(start, device)


def allocator_slack(device: torch.device) -> float:
    """Reserved over requested, less one, after maps of many sizes came and went; 0 where the allocator does not tell."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    generator, held = torch.Generator().manual_seed(0), []
    for _ in range(400):
        count = int(torch.randint(2**18, 2**25, (), generator=generator))
        held.append(torch.empty(count, dtype=torch.uint8, device=device))
        if len(held) > 24:
            del held[int(torch.randint(0, len(held), (), generator=generator))]
    reserved, allocated = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
    return max(0.0, reserved / allocated - 1)
