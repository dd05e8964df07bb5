"""Memory of this process: peak usage, and the policy for freed pages."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
FreedPages = Literal["kept", "returned", "usual"]
"""What the C library does with freed pages: keep them, return them to the system at once, or its default."""

MALLOC: dict[FreedPages, dict[int, int]] = {
    "kept": {M_MMAP_THRESHOLD: 2**27, M_TRIM_THRESHOLD: -1},  # a higher limit would double what whole maps hold
    "returned": {M_MMAP_THRESHOLD: 2**22},
    "usual": {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26},  # where glibc's own adaptation ends
}


@contextlib.contextmanager
def freed_pages(way: FreedPages) -> Iterator[None]:
    """Choose what glibc does with freed pages inside the block; no effect with other C libraries.

    By default glibc maps every block above 32 MiB anew, so each band of a large decode has to fault in fresh pages: a
    quarter of the time at 4096 px on two cores, half of it for a small network. "kept" avoids that, at the price of 1 % more
    memory in bands and a third more in whole maps. Smaller blocks glibc keeps by default: a tiled render, whose maps have
    many sizes, then holds up to twice its working set. "returned" gives blocks from 4 MiB on back at once. After the block
    the default policy holds again and all free pages are returned.
    """
    if way == "usual":
        yield
        return
    _set_malloc_options(MALLOC[way])
    try:
        yield
    finally:
        _set_malloc_options(MALLOC["usual"])
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _set_malloc_options(options: Mapping[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in options.items():
            library.mallopt(option, value)


def peak_device_bytes(device: torch.device) -> int:
    """Peak bytes of torch's allocator on a card since `reset_peak`; on a CPU, of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return peak_resident_bytes()


def reset_peak(device: torch.device) -> None:
    """Start a new peak of the card's allocator; no effect on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_resident_bytes() -> int:
    """Peak resident memory of the process since its start or the last reset; 0 if the system has no such figure."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return _peak_by_rusage()


def resident_bytes() -> int:
    """Resident memory of the process now; the peak where the system has no such figure."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    except (OSError, StopIteration):
        return peak_resident_bytes()


def reset_resident_peak() -> bool:
    """Reset `peak_resident_bytes`; returns whether the system supports it (Linux does)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_by_rusage() -> int:
    """Peak resident bytes on systems without /proc: in bytes on macOS, 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes_so_far() -> int:
    """The peak that a progress line shows: of the card in use, else of the process."""
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        return int(torch.cuda.max_memory_reserved())
    return peak_resident_bytes()
