"""Describes devices without torch: this machine's CPU, or a card elsewhere."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from hires.devices.spec import DeviceSpec
from hires.units import gib

CPU_BUDGET_BYTES = 2 * 2**30  # larger tiles gain nothing on a CPU
CORE_FLOPS = {"avx512f": 100e9, "avx2": 50e9, "": 25e9}  # sustained float32 convolutions per core by its widest vectors
CARD_FLOPS = 80e12  # half the dense bf16 rate of a 24 GB card of 2022, the planning assumption for `--vram` alone
CARD_CALL_SECONDS = 0.02  # to start a network's kernels, whatever the batch: a few thousand launches
CPU_CALL_SECONDS = 0.01  # as above; measured with the shipped model's UNet, by its seconds for 1 to 8 images
CPU_BF16_GAIN = 1.5  # a network in bf16 over float32 on a CPU that multiplies bf16; measured: 1.5 to 1.6
CPU_BF16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))
COPY_BYTES_PER_SECOND = 12e9  # between host memory and a card, half of what PCIe 4 x16 promises


def host_device(budget_bytes: int | None = None, ram_bytes: int = 0, own_bytes: int = 0) -> DeviceSpec:
    """The CPU of this machine, described without torch; own_bytes of models that this process can let go count as free."""
    cores = os.cpu_count() or 1
    free = available_host_bytes() + own_bytes
    budget = budget_bytes or min(CPU_BUDGET_BYTES, free // 2)
    most = 0 if budget_bytes else 4 * free // 5
    return DeviceSpec(
        name=f"CPU, {cores} cores",
        kind="cpu",
        budget_bytes=budget,
        flops=cores * core_flops(),
        bf16=multiplies_bf16(),
        most_bytes=min(most, ram_bytes) if ram_bytes else most,
        ram_bytes=ram_bytes,
        call_seconds=CPU_CALL_SECONDS,
    )


@cache
def multiplies_bf16() -> bool:
    """Whether this x86 CPU multiplies bf16 in hardware; False where /proc/cpuinfo is missing."""
    return not CPU_BF16_FLAGS.isdisjoint(_flags())


@cache
def core_flops() -> float:
    """What a core of this CPU is taken to sustain in FLOP/s: measured with 512-bit vectors, half of that for half their width.

    The least where /proc/cpuinfo is missing. `hires bench calibrate` measures it.
    """
    flags = _flags()
    return next(rate for name, rate in CORE_FLOPS.items() if not name or name in flags)


def _flags() -> frozenset[str]:
    """What /proc/cpuinfo says that an x86 CPU can do; empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def available_host_bytes() -> int:
    """Host memory available without swapping; 8 GiB is assumed where /proc/meminfo is missing."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 8 * 2**30


def described_card(budget_bytes: int, ram_bytes: int = 0) -> DeviceSpec:
    """A card that is not in this machine: the user gave `--vram` and there is no card here."""
    name = f"a card with {gib(budget_bytes)}"
    return DeviceSpec(
        name=name,
        kind="cuda",
        budget_bytes=budget_bytes,
        flops=CARD_FLOPS,
        bf16=True,
        elsewhere=True,
        ram_bytes=ram_bytes,
        call_seconds=CARD_CALL_SECONDS,
        copy_bytes_per_second=COPY_BYTES_PER_SECOND,
    )
