"""Recognises out-of-memory errors and retries with less; finished work is kept."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from hires.devices.memory import peak_bytes_so_far
from hires.errors import MemoryLadderError
from hires.units import gib

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

# CUDA libraries report a failed workspace allocation by these messages.
_OUT_OF_MEMORY_MESSAGES = re.compile(
    r"out of memory|CUDNN_STATUS_(INTERNAL_ERROR|ALLOC_FAILED|NOT_SUPPORTED)|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator",
    re.IGNORECASE,
)
_NO_STORAGE = "shape of object type 'torch.storage"  # from torch.asarray, which reads files, if the tensor has no room


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: torch's and Python's own, and library errors that hide one."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, ValueError):
        return _NO_STORAGE in str(error)
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY_MESSAGES.search(str(error)) is not None


def free_memory() -> None:
    """Collect garbage and empty the CUDA allocator's cache: for an out-of-memory and to unload, as it takes up to a second."""
    gc.collect()
    empty_cache()


def empty_cache() -> None:
    """Give what the CUDA allocator keeps of freed tensors back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Batcher:
    """Runs items in batches; halves the batch size for good when a batch runs out of memory. Results keep their order.

    Args:
        batch: items at once.
        relief: frees memory when a single item is too large and returns what it did, for the log; the item is then tried
            again. Returns None if nothing is left to free.

    `retries` counts the retries.
    """

    def __init__(self, batch: int, relief: Callable[[], str | None] | None = None) -> None:
        self.batch = max(1, batch)
        self.retries = 0
        self._relief = relief or (lambda: None)

    def map(self, run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> Iterator[Sequence[Result]]:
        """Yield the results of consecutive batches. MemoryLadderError if a single item is too large; other errors pass."""
        start = 0
        while start < len(items):
            chunk = items[start : start + self.batch]
            results, message = attempt(run, chunk)
            if results is not None:
                yield results
                start += len(chunk)
                continue
            free_memory()
            self.lessen(len(chunk), message)

    def lessen(self, tried: int, message: str) -> None:
        """Halve the batch after `tried` items at once ran out of memory, or free memory if the batch is one item.

        MemoryLadderError if nothing is left to free.
        """
        what = f"{tried} picture{'s' if tried > 1 else ''} at once"
        if self.batch > 1:
            self.batch = max(1, min(self.batch, tried) // 2)
            remedy: str | None = f"{self.batch} at once"
        else:
            remedy = self._relief()
        if remedy is None:
            raise MemoryLadderError(
                f"one tile of one picture alone runs out of memory ({message}): "
                "give a smaller `tile_px`, or `strategy` progressive"
            )
        self.retries += 1
        log.warning("out of memory with %s (%s); going on with %s", what, message, remedy)


class Ladder(Generic[Item]):
    """Runs work at the first rung that has enough memory and stays there; `taken` counts the rungs given up."""

    def __init__(self, rungs: Sequence[Item], describe: Callable[[Item], str]) -> None:
        self.rungs, self.describe, self.taken = list(rungs), describe, 0

    @property
    def rung(self) -> Item:
        """The current rung."""
        return self.rungs[self.taken]

    def run(self, work: Callable[[Item], Result]) -> Result:
        """The result of `work(rung)`. MemoryLadderError after the last rung; other errors pass."""
        while True:
            result, message = attempt(work, self.rung)
            if result is not None:
                return result
            self.descend(message)

    def descend(self, message: str) -> None:
        """Free memory, go to the next rung and log it. MemoryLadderError after the last rung."""
        free_memory()
        failed = self.describe(self.rung)
        if self.taken + 1 == len(self.rungs):
            raise MemoryLadderError(
                f"out of memory on every rung, the last {failed} ({message}): "
                "give a smaller picture (`size`) or more memory (`vram`)"
            )
        self.taken += 1
        log.warning("out of memory with %s (%s); going on with %s", failed, message, self.describe(self.rung))


def twice(run: Callable[[], Result], what: str) -> Result:
    """The result of `run`, tried once more after freeing memory. `what` describes it for the log."""
    result, message = attempt(lambda _: run(), None)
    if result is not None:
        return result
    free_memory()
    log.warning("out of memory while %s (%s); trying once more", what, message)
    return run()


def attempt(run: Callable[[Item], Result], item: Item) -> tuple[Result | None, str]:
    """The result, or None and the first line of an out-of-memory error.

    Returning from the except block releases the tensors that its traceback holds.
    """
    try:
        return run(item), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        return None, f"{reason}; peak so far {gib(peak_bytes_so_far())}"
