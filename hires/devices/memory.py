"""Memory of this process: peaks, and what becomes of freed pages."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

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
