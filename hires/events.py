"""Progress of a run, and what each stage of it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress: `done` of `total` tiles of a stage; `step` and `steps` count sampler steps where the stage has them.

    preview: after a step: the estimate as (h, w, 3) uint8 pixels, 512 px at most, drawn by a small autoencoder where one was
    given, else by one linear map per latent cell; None for autoencoders that have no such map.
    """

    stage: str
    done: int
    total: int
    step: int = 0
    steps: int = 0
    preview: Any = None


OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """What one stage took: seconds, peak bytes where the device can tell, tiles evaluated, ladder rungs taken, and tiles
    and bands that overflowed in half precision and were computed again."""

    stage: str
    seconds: float
    peak_bytes: int
    tiles: int
    retries: int = 0
    recomputed: int = 0
