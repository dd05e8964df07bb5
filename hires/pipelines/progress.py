"""Progress of a stage: tiles and steps as events."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hires.events import Event, OnEvent
from hires.planning.plan import StagePlan
from hires.sampling.registry import SAMPLER_FACTS, evaluations


class TileProgress:
    """Turns tile batches and sampler steps into events.

    Args:
        stage: the stage.
        on_event: takes the events.
        preview: an estimate as a small picture, None for none.
        calls: how often an evaluation goes over the tiles.
    """

    def __init__(
        self, stage: StagePlan, on_event: OnEvent, preview: Callable[[Tensor], NDArray[np.uint8] | None], calls: int = 1
    ) -> None:
        self.stage, self.on_event, self.preview, self.calls = stage, on_event, preview, calls
        self.done, self.steps_done = 0, 0
        self.total = evaluations(stage.sampler, stage.taken_steps) * stage.grid.count * calls
        self._recalled = self._shown = 0

    def begin(self) -> None:
        """From the start, again after a stage that ran out of memory; what is shown does not go back."""
        self.done = self.steps_done = self._recalled = 0
        self._tell()

    def advance(self, tiles: int) -> None:
        """Count finished tiles and report them."""
        self.done += tiles
        self.total = max(self.total, self.done + self._recalled)
        self._tell()

    def recall(self, tiles: int) -> None:
        """Tiles of an evaluation that a journal had: shown as done, not counted as work."""
        self._recalled += tiles
        self.total = max(self.total, self.done + self._recalled)
        self._tell()

    def step(self, index: int, denoised: Tensor) -> None:
        """Report a finished step with a preview of its estimate (1, C, h, w)."""
        self.steps_done = min(index + 1, self.stage.taken_steps)
        self._tell(self.preview(denoised))

    def finish(self) -> None:
        """Where the sampler's evaluations were an estimate, the count it came to; a stage that a journal had is done."""
        evaluated = self.done + self._recalled
        if evaluated and SAMPLER_FACTS[self.stage.sampler].known:
            return
        self.total = self._shown = evaluated or self.total
        self._recalled = self._recalled if evaluated else self.total
        self.steps_done = self.stage.taken_steps
        self._tell()

    def _tell(self, preview: NDArray[np.uint8] | None = None) -> None:
        stage, steps = self.stage, self.stage.taken_steps
        self._shown = max(self._shown, self.done + self._recalled)
        self.on_event(
            Event(
                stage=stage.name,
                done=self._shown,
                total=self.total,
                step=self.steps_done,
                steps=steps,
                preview=preview,
                recalled=min(self._recalled, self._shown),
            )
        )
