"""What counts as out of memory, and going on with less after it. Finished work is kept."""

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

# CUDA libraries report a failed workspace allocation under these names.
_DISGUISES = re.compile(
    r"out of memory|CUDNN_STATUS_(INTERNAL_ERROR|ALLOC_FAILED|NOT_SUPPORTED)|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator",
    re.IGNORECASE,
)
_NO_STORAGE = "shape of object type 'torch.storage"  # torch.asarray, by which files are read, of a tensor that had no room


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's and Python's own out-of-memory errors and for the errors that are one in disguise."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, ValueError):
        return _NO_STORAGE in str(error)
    return isinstance(error, RuntimeError) and _DISGUISES.search(str(error)) is not None


def free_memory() -> None:
    """Give back what no longer has a reference, the CUDA allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Batcher:
    """Runs items in batches and halves the batch, for good, when one runs out of memory; results keep their order.

    relief: called where a single item is too large; what it says it did is logged and the item tried again, until it has
    nothing left to do and returns None.
    """

    def __init__(self, batch: int, relief: Callable[[], str | None] | None = None) -> None:
        self.batch = max(1, batch)
        self.retries = 0
        self._relief = relief or (lambda: None)

    def map(self, run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> Iterator[Sequence[Result]]:
        """Results of consecutive batches. MemoryLadderError when a single item is too large; other errors pass."""
        start = 0
        while start < len(items):
            chunk = items[start : start + self.batch]
            done, message = attempt(run, chunk)
            if done is not None:
                yield done
                start += len(chunk)
                continue
            free_memory()
            self.lessen(len(chunk), message)

    def lessen(self, tried: int, message: str) -> None:
        """After `tried` items at once ran out of memory: half of them, or relief. MemoryLadderError where there is none."""
        what = f"{tried} picture{'s' if tried > 1 else ''} at once"
        if self.batch > 1:
            self.batch = max(1, min(self.batch, tried) // 2)
            done: str | None = f"{self.batch} at once"
        else:
            done = self._relief()
        if done is None:
            raise MemoryLadderError(
                f"one tile of one picture alone runs out of memory ({message}): "
                "give a smaller --tile, or --strategy progressive"
            )
        self.retries += 1
        log.warning("out of memory with %s (%s); going on with %s", what, message, done)


class Ladder(Generic[Item]):
    """Runs work at the first rung that has memory for it and stays there; `taken` counts the rungs left behind."""

    def __init__(self, rungs: Sequence[Item], describe: Callable[[Item], str]) -> None:
        self.rungs, self.describe, self.taken = list(rungs), describe, 0

    @property
    def rung(self) -> Item:
        return self.rungs[self.taken]

    def run(self, work: Callable[[Item], Result]) -> Result:
        """The result of `work(rung)`. MemoryLadderError after the last rung; other errors pass."""
        while True:
            done, message = attempt(work, self.rung)
            if done is not None:
                return done
            self.descend(message)

    def descend(self, message: str) -> None:
        """Free what is free and go to the next rung, with a line in the log. MemoryLadderError where there is none."""
        free_memory()
        failed = self.describe(self.rung)
        if self.taken + 1 == len(self.rungs):
            raise MemoryLadderError(
                f"out of memory on every rung, the last {failed} ({message}): "
                "give a smaller picture (--size) or more memory (--vram)"
            )
        self.taken += 1
        log.warning("out of memory with %s (%s); going on with %s", failed, message, self.describe(self.rung))


def twice(run: Callable[[], Result], what: str) -> Result:
    """The result, tried once more after freeing what is free where `what` ran out of memory."""
    done, message = attempt(lambda _: run(), None)
    if done is not None:
        return done
    free_memory()
    log.warning("out of memory while %s (%s); trying once more", what, message)
    return run()


def attempt(run: Callable[[Item], Result], item: Item) -> tuple[Result | None, str]:
    """The result, or None and the first line of an out-of-memory error; the except block, which holds tensors, is left."""
    try:
        return run(item), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        return None, f"{reason}; peak so far {gib(peak_bytes_so_far())}"
