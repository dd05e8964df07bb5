"""What counts as out of memory, and going on with less after it. Finished work is kept."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from hires.errors import MemoryLadderError

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

# CUDA libraries report a failed workspace allocation under these names.
_DISGUISES = re.compile(
    r"out of memory|CUDNN_STATUS_(INTERNAL_ERROR|ALLOC_FAILED)|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's and Python's own out-of-memory errors and for the RuntimeErrors that are one in disguise."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _DISGUISES.search(str(error)) is not None


def free_memory() -> None:
    """Give back what no longer has a reference, the CUDA allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Batcher:
    """Runs items in batches and halves the batch, for good, when one runs out of memory; results keep their order."""

    def __init__(self, batch: int) -> None:
        self.batch = max(1, batch)
        self.retries = 0

    def map(self, run: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> Iterator[Sequence[Result]]:
        """Results of consecutive batches. MemoryLadderError when a single item is too large; other errors pass."""
        start = 0
        while start < len(items):
            chunk = items[start : start + self.batch]
            done, message = _attempt(run, chunk)
            if done is not None:
                yield done
                start += len(chunk)
                continue
            free_memory()
            if self.batch == 1:
                raise MemoryLadderError(f"one tile alone runs out of memory ({message}): give a smaller --tile")
            self.batch = max(1, min(self.batch, len(chunk)) // 2)
            self.retries += 1
            log.warning("out of memory with %d tiles at once (%s); going on with %d", len(chunk), message, self.batch)


def first_that_fits(
    run: Callable[[Item], Result], rungs: Sequence[Item], describe: Callable[[Item], str]
) -> tuple[Result, int]:
    """The result of the first rung that has enough memory, and its index. MemoryLadderError after the last."""
    message = ""
    for index, rung in enumerate(rungs):
        done, message = _attempt(run, rung)
        if done is not None:
            return done, index
        free_memory()
        following = describe(rungs[index + 1]) if index + 1 < len(rungs) else "no rung is left"
        log.warning("out of memory (%s); next: %s", message, following)
    raise MemoryLadderError(f"out of memory on every rung ({message}): give a smaller --size or a larger --vram")


def _attempt(run: Callable[[Item], Result], item: Item) -> tuple[Result | None, str]:
    """The result, or None and the first line of an out-of-memory error; the except block, which holds tensors, is left."""
    try:
        return run(item), ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).strip().split("\n")[0][:200]
