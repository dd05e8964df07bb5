"""Out of memory at any operator call of a whole render: the picture of none, or a refusal that names the option."""

from __future__ import annotations

import contextlib
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hires
from hires.engine.results import RenderResult
from hires.errors import MemoryLadderError

NEXT_MOVE = r"`\w+`|close other programs"
OPTIONS: dict[str, Any] = {"size": "400x272", "steps": 2, "seed": 5}


class Faults(TorchDispatchMode):
    """Raises at the given operator calls, counted over the whole run."""

    def __init__(self, at: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.calls, self.raised = at, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls in self.at:
            self.raised += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. (injected at call {self.calls}, {func})")
        return func(*args, **(kwargs or {}))


def rendered(at: set[int]) -> tuple[RenderResult, Faults]:
    with Faults(at) as faults:
        return hires.render("a sun over a lake", **OPTIONS), faults


@pytest.fixture(scope="module")
def undisturbed() -> tuple[RenderResult, int]:
    rendered(set())  # what is made once per process is made: the next run's calls are every run's
    result, faults = rendered(set())
    return result, faults.calls


def check(at: set[int], undisturbed: tuple[RenderResult, int]) -> None:
    whole, _ = undisturbed
    result, faults = rendered(at)
    assert faults.raised, "the fault happened"
    difference = np.abs(result.pixels.astype(int) - whole.pixels.astype(int))
    assert difference.max() <= 1, (at, difference.max(), (difference > 0).mean())
    assert (difference > 0).mean() <= 1e-3, "rounding of an 8-bit value, here and there"


def drawn(count: int, total: int, each: int = 1) -> list[set[int]]:
    chance = random.Random(11 * count + each)
    return [{chance.randrange(1, total) for _ in range(each)} for _ in range(count)]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_one_fault_anywhere_changes_nothing(undisturbed: tuple[RenderResult, int], count: int) -> None:
    for at in drawn(count, undisturbed[1]):
        check(at, undisturbed)


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_an_engine_after_a_fault_is_a_fresh_one(undisturbed: tuple[RenderResult, int], count: int) -> None:
    """Out of memory at any call of a used engine, then the same picture as if it had not been (law 10)."""
    with hires.load() as engine:
        engine.render("a sun over a lake", **OPTIONS)
        with Faults(set()) as counted:
            engine.render("a sun over a lake", **OPTIONS)
        assert counted.calls < undisturbed[1], "nothing is loaded"
        for at in drawn(count, counted.calls, each=2):
            with Faults(at) as faults, contextlib.suppress(MemoryLadderError):
                engine.render("a sun over a lake", **OPTIONS)
            assert faults.raised, "the fault happened"
            assert np.array_equal(engine.render("a sun over a lake", **OPTIONS).pixels, undisturbed[0].pixels), at


@pytest.mark.slow
@pytest.mark.parametrize("at", drawn(150, 30000), ids=lambda at: str(min(at)))
def test_one_fault_at_any_call(at: set[int], undisturbed: tuple[RenderResult, int]) -> None:
    check({1 + min(at) % (undisturbed[1] - 1)}, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("at", drawn(60, 30000, 3), ids=lambda at: "-".join(map(str, sorted(at))))
def test_several_faults_change_nothing_or_are_refused(at: set[int], undisturbed: tuple[RenderResult, int]) -> None:
    try:
        check({1 + call % (undisturbed[1] - 1) for call in at}, undisturbed)
    except MemoryLadderError as refusal:
        if not re.search(NEXT_MOVE, str(refusal)):
            raise


@pytest.mark.slow
def test_memory_that_is_never_there_is_refused_with_the_next_move(undisturbed: tuple[RenderResult, int]) -> None:
    for first in drawn(2, undisturbed[1]):
        with pytest.raises(MemoryLadderError, match=NEXT_MOVE):
            rendered(set(range(min(first), 10**6)))


@pytest.mark.slow
def test_smaller_windows_only_where_they_are_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A network that never has room for the trained tile: refused, or drawn in smaller ones that the plan names."""
    from hires.models.unet import UNetNetwork

    real = UNetNetwork.__call__

    def scarce(self: UNetNetwork, x: torch.Tensor, time: float, cond: Any) -> torch.Tensor:
        if x.shape[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return real(self, x, time, cond)

    monkeypatch.setattr(UNetNetwork, "__call__", scarce)
    options = {"size": "256x256", "steps": 1, "strategy": "tiled"}
    with pytest.raises(MemoryLadderError, match="tile_px"):
        hires.render("a sun", **options)  # type: ignore[arg-type]
    output = tmp_path / "a.png"
    result = hires.render("a sun", allow_approximate=True, output=output, **options)  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert result.plan.latent_grid.tile.width == 16
    assert any(note.startswith("approximation: tiles of 128 px") for note in result.plan.notes)
