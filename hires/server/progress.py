"""How far a job has come: a fraction that never falls, time left, preview."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hires.client.documents import ProgressDocument
from hires.events import Event

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP = 0.02
"""A fraction of the work; before it, the time left comes from the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job has come."""

    fraction: float = 0.0
    """0 to 1, over all pictures of the job."""
    picture: int = 0
    """The number of the picture in progress, from 0."""
    pictures: int = 1
    """Pictures of the whole job."""
    stage: str = ""
    done: int = 0
    """Tiles (or bands) that the stage has finished."""
    total: int = 0
    """Tiles (or bands) of the whole stage."""
    step: int = 0
    steps: int = 0
    eta_seconds: float | None = None
    """Expected seconds until the job is done; None before anything is known."""
    previews: int = 0
    """How many previews there have been."""

    def to_json(self) -> ProgressDocument:
        """The progress as plain JSON values."""
        return {
            "fraction": round(self.fraction, 4),
            "picture": self.picture,
            "pictures": self.pictures,
            "stage": self.stage,
            "done": self.done,
            "total": self.total,
            "step": self.step,
            "steps": self.steps,
            "eta_seconds": None if self.eta_seconds is None else round(self.eta_seconds, 1),
            "previews": self.previews,
        }


class Meter:
    """Turns the events of a job's pictures into its progress, `now`."""

    def __init__(self, pictures: int) -> None:
        self.now = Progress(pictures=pictures)
        self.preview: NDArray[np.uint8] | None = None
        """The latest, (h, w, 3); None before the first."""
        self._weights: Mapping[str, float] = {}
        self._finished = 0.0
        self._stage = ""
        self._begun = time.monotonic()

    def begin(self, picture: int, weights: Mapping[str, float]) -> None:
        """Begin a picture; weights: the seconds that each of its stages is expected to take."""
        if picture == 0:
            self._begun = time.monotonic()
        self._weights, self._finished, self._stage = weights, 0.0, ""
        self._show(picture, picture / self.now.pictures, Event(stage="plan", done=0, total=1))

    def hear(self, event: Event) -> None:
        """Take in an event of the picture in progress."""
        if event.preview is not None:
            self.preview = event.preview
        if event.stage != self._stage:
            self._finished += self._weights.get(self._stage, 0.0)
            self._stage = event.stage
        share = self._weights.get(event.stage, 0.0) * min(1.0, event.done / max(1, event.total))
        within = (self._finished + share) / max(sum(self._weights.values()), 1e-9)
        picture = self.now.picture
        self._show(picture, (picture + min(1.0, within)) / self.now.pictures, event)

    def finish(self) -> None:
        """Show all pictures as finished."""
        self._show(self.now.pictures - 1, 1.0, Event(stage="done", done=1, total=1))

    def _show(self, picture: int, fraction: float, event: Event) -> None:
        fraction = min(1.0, max(fraction, self.now.fraction))
        self.now = Progress(
            fraction=fraction,
            picture=picture,
            pictures=self.now.pictures,
            stage=event.stage,
            done=event.done,
            total=event.total,
            step=event.step,
            steps=event.steps,
            eta_seconds=self._eta(fraction),
            previews=self.now.previews + (event.preview is not None),
        )

    def _eta(self, fraction: float) -> float | None:
        if fraction >= 1:
            return 0.0
        passed, planned = time.monotonic() - self._begun, sum(self._weights.values()) * self.now.pictures
        if fraction < STEP:
            return planned * (1 - fraction) if planned else None
        return passed * (1 - fraction) / fraction
