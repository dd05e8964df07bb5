"""How far a job has come: a fraction that never falls, time left, preview."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hires.client.documents import ProgressDocument
from hires.devices.memory import peak_bytes_so_far
from hires.events import Event

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
    """Expected seconds until the job is done; None before anything was measured."""
    elapsed: float = 0.0
    """Seconds since its first picture began."""
    device: str = ""
    """Where it runs; empty before that is known."""
    peak_bytes: int = 0
    """The most memory that was held so far: of the card at work, else of the process."""
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
            "elapsed": round(self.elapsed, 1),
            "device": self.device,
            "peak_bytes": self.peak_bytes,
            "previews": self.previews,
        }


class Meter:
    """Turns the events of a job's pictures into its progress, `now`."""

    def __init__(self, pictures: int) -> None:
        self.now = Progress(pictures=pictures)
        self.preview: NDArray[np.uint8] | None = None
        """The latest, (h, w, 3); None before the first."""
        self._begun = self._picture_begun = time.monotonic()
        self._first: int | None = None

    def begin(self, picture: int) -> None:
        """Begin a picture."""
        self._picture_begun = time.monotonic()
        if self._first is None:  # an earlier server may have made others
            self._first, self._begun = picture, self._picture_begun
        self._show(picture, Event(stage="plan", done=0, total=1))

    def hear(self, event: Event) -> None:
        """Take in an event of the picture in progress."""
        if event.preview is not None:
            self.preview = event.preview
        self._show(self.now.picture, event)

    def finish(self) -> None:
        """Show all pictures as finished."""
        self._show(self.now.pictures - 1, Event(stage="done", done=1, total=1, fraction=1.0, eta_seconds=0.0))

    def _show(self, picture: int, event: Event) -> None:
        self.now = Progress(
            fraction=min(1.0, max((picture + event.fraction) / self.now.pictures, self.now.fraction)),
            picture=picture,
            pictures=self.now.pictures,
            stage=event.stage,
            done=event.done,
            total=event.total,
            step=event.step,
            steps=event.steps,
            eta_seconds=self._eta(picture, event),
            elapsed=time.monotonic() - self._begun,
            device=event.device or self.now.device,
            peak_bytes=peak_bytes_so_far(),
            previews=self.now.previews + (event.preview is not None),
        )

    def _eta(self, picture: int, event: Event) -> float | None:
        """Those of the picture in progress, and for each picture to come as many as one took so far."""
        if event.eta_seconds is None:
            return None
        rest = self.now.pictures - picture - 1
        whole = event.eta_seconds / (1 - event.fraction) if event.fraction < 1 else time.monotonic() - self._picture_begun
        made = picture - (self._first or 0)
        each = (self._picture_begun - self._begun) / made if made else whole
        return event.eta_seconds + rest * each
