"""The devices that are here: what they are, what is free on them, and how torch calls them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

from hires.errors import RequestError
from hires.machines import CARD_CALL_SECONDS, COPY_BYTES_PER_SECOND, host_device
from hires.types import DeviceSpec

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CARD_SLACK = 0.94  # of free memory: the allocator's rounding and the context stay outside plans


def choose_device(asked: str) -> torch.device:
    """'auto', 'cpu' or 'cuda:N' as a torch device; RequestError for one that is not here."""
    if asked == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise RequestError(f"--device {asked!r}: give auto, cpu or cuda:0") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise RequestError(f"--device {asked!r}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise RequestError(f"--device {asked!r}: torch sees no CUDA device here; use --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"--device {asked!r}: this machine has {torch.cuda.device_count()}, cuda:0 is the first")
    return torch.device("cuda", device.index or 0)


def probe(device: torch.device, budget_bytes: int | None = None, ram_bytes: int = 0) -> DeviceSpec:
    """The facts of a device that plans need; a given budget replaces the free memory, never more than is free.

    ram_bytes: what the whole process may hold in host memory, 0 where nobody said.
    """
    if device.type == "cpu":
        return host_device(budget_bytes, ram_bytes)
    facts = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    usable = int(free * CARD_SLACK)
    return DeviceSpec(
        name=facts.name,
        kind="cuda",
        budget_bytes=usable if budget_bytes is None else min(budget_bytes, usable),
        flops=facts.multi_processor_count * 1e12 * 0.5,
        bf16=facts.major >= 8,
        ram_bytes=ram_bytes,
        call_seconds=CARD_CALL_SECONDS,
        copy_bytes_per_second=COPY_BYTES_PER_SECOND,
    )


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
FreedPages = Literal["kept", "returned", "usual"]
MALLOC: dict[FreedPages, dict[int, int]] = {
    "kept": {M_MMAP_THRESHOLD: 2**27, M_TRIM_THRESHOLD: -1},  # without limit, whole maps would hold twice what they are
    "returned": {M_MMAP_THRESHOLD: 2**22},
    "usual": {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26},  # what glibc comes to by itself
}


@contextlib.contextmanager
def freed_pages(way: FreedPages) -> Iterator[None]:
    """Within, what the process frees stays its own, or goes back to the system at once; where the C library can be told so.

    By itself glibc maps every block above 32 MiB anew, so that each band of a large decode fills fresh pages: a quarter of the
    seconds at 4096 px on two cores, half of a small network's. "kept" saves them, and holds 1 % more in bands, a third more in
    whole maps. And smaller blocks it keeps: a tiled render, whose maps are of many sizes, then holds up to twice what it works
    with, which "returned" gives back, for fresh pages from 4 MiB on. Afterwards all goes back, and blocks are had as before.
    """
    if way == "usual":
        yield
        return
    _tell_malloc(MALLOC[way])
    try:
        yield
    finally:
        _tell_malloc(MALLOC["usual"])
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _tell_malloc(options: Mapping[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in options.items():
            library.mallopt(option, value)


def peak_device_bytes(device: torch.device) -> int:
    """The most that torch's allocator held on a card since `reset_peak`; on a CPU, the process's peak resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return peak_resident_bytes()


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_resident_bytes() -> int:
    """The process's peak resident memory since it started (or since it was reset); 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return _peak_by_rusage()


def reset_resident_peak() -> bool:
    """Let `peak_resident_bytes` start anew; whether the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_by_rusage() -> int:
    """The same where there is no /proc: bytes on macOS, nothing to ask on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes_so_far() -> int:
    """What a progress line shows: the peak on the card in use, else the process's."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        return int(torch.cuda.max_memory_reserved())
    return peak_resident_bytes()
