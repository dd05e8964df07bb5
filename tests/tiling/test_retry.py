from __future__ import annotations

import logging
import re

import pytest
import torch

from hires.errors import MemoryLadderError
from hires.tiling.retry import Batcher, Ladder, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_out_of_memory_is_known_in_its_disguises(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDNN_STATUS_BAD_PARAM"),
        ValueError("out of memory"),
        KeyboardInterrupt("out of memory"),
    ],
)
def test_nothing_else_is_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_batch_is_halved_for_good_and_order_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def double(items: list[int]) -> list[int]:
        if len(items) > 3:
            raise MemoryError("host")
        return [2 * i for i in items]

    batcher = Batcher(8)
    with caplog.at_level(logging.WARNING):
        assert [v for part in batcher.map(double, list(range(20))) for v in part] == [2 * i for i in range(20)]
    assert (batcher.batch, batcher.retries) == (2, 2)
    assert re.search(r"out of memory with 8 pictures at once \(host; peak so far [\d.]+ GiB\); going on with 4", caplog.text)


def test_other_errors_come_out_unchanged() -> None:
    error = RuntimeError("device-side assert")

    def broken(items: list[int]) -> list[int]:
        raise error

    with pytest.raises(RuntimeError) as caught:
        list(Batcher(4).map(broken, [1, 2, 3]))
    assert caught.value is error


def test_the_ladder_takes_the_first_rung_that_fits() -> None:
    def need(rung: int) -> str:
        if rung > 2:
            raise RuntimeError("CUDA out of memory")
        return f"ran at {rung}"

    ladder = Ladder([8, 4, 2, 1], str)
    assert ladder.run(need) == "ran at 2"
    assert (ladder.taken, ladder.rung) == (2, 2)
    assert ladder.run(str) == "2"  # it stays where there was room
    with pytest.raises(MemoryLadderError, match="every rung"):
        Ladder([8, 4], str).run(need)
