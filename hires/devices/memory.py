"""Memory of this process: peak usage, and the policy for freed pages."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
FreedPages = Literal["kept", "returned", "usual"]
"""What the C library does with freed pages: keep them, return them to the system at once, or its default."""

MALLOC: dict[FreedPages, dict[int, int]] = {
    "kept": {M_MMAP_THRESHOLD: 2**27, M_TRIM_THRESHOLD: -1},  # a higher limit would double what whole maps hold
    "returned": {M_MMAP_THRESHOLD: 2**22, M_TRIM_THRESHOLD: 2**26},  # a lower one would fault small blocks in anew
    "usual": {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26},  # where glibc's own adaptation ends
}
"""The options of each way: all of them each time, as another way may have been in force before."""
FRUGAL: tuple[FreedPages, ...] = ("returned", "usual", "kept")
"""The ways from the one that holds the least memory to the one that holds the most."""


class PagePolicy:
    """What the C library does with freed pages while several blocks of `freed_pages` are at work.

    Its options belong to the whole process, so the most frugal of the ways at work is in force: a render that must return
    memory gets that beside one that would keep it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work: list[FreedPages] = []
        self._in_force: FreedPages = "usual"
        self._changed = False  # since nothing was at work

    def enter(self, way: FreedPages) -> None:
        """A block begins."""
        with self._lock:
            self._at_work.append(way)
            self._apply()

    def leave(self, way: FreedPages) -> None:
        """A block ends: the others get what they want; after the last one the default holds and free pages are returned."""
        with self._lock:
            self._at_work.remove(way)
            self._apply()
            if not self._at_work and self._changed:
                self._changed = False
                _return_free_pages()

    def _apply(self) -> None:
        way: FreedPages = min(self._at_work, key=FRUGAL.index, default="usual")
        if way != self._in_force:
            _set_malloc_options(MALLOC[way])
            self._in_force, self._changed = way, True


PAGE_POLICY = PagePolicy()
"""That of this process."""


@contextlib.contextmanager
def freed_pages(way: FreedPages) -> Iterator[None]:
    """Choose what glibc does with freed pages inside the block; no effect with other C libraries.

    By default glibc maps every block above 32 MiB anew, so each band of a large decode has to fault in fresh pages: a
    quarter of the time at 4096 px on two cores, half of it for a small network. "kept" avoids that, at the price of 1 % more
    memory in bands and a third more in whole maps. Smaller blocks glibc keeps by default: a tiled render, whose maps have
    many sizes, then holds up to twice its working set. "returned" gives blocks from 4 MiB on back at once.

    Blocks of several threads may overlap: the most frugal way of those at work holds for all of them. After the last one the
    default policy holds again and all free pages are returned; blocks that are all "usual" touch nothing.
    """
    PAGE_POLICY.enter(way)
    try:
        yield
    finally:
        PAGE_POLICY.leave(way)


def _return_free_pages() -> None:
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
