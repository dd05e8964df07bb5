"""Progress events of a run, and the statistics of each finished stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Progress of one stage of a run, and of the whole run."""

    stage: str
    """The name of the stage."""
    done: int
    """Tiles (or bands) that the stage has finished."""
    total: int
    """Tiles (or bands) of the whole stage."""
    step: int = 0
    """Sampler steps finished; 0 in stages that do not sample."""
    steps: int = 0
    """Sampler steps of the stage; 0 in stages that do not sample."""
    preview: Any = None
    """The denoised estimate after a step, (h, w, 3) uint8, at most 512 px a side; None where no preview can be drawn.

    The preview autoencoder draws it if the request names one, else one linear map per latent cell.
    """
    recalled: int = 0
    """How many of `done` an earlier run had finished: read from its journal, not computed now."""
    fraction: float = 0.0
    """How much of the whole run is done, 0 to 1; it never falls, and loading does not count."""
    eta_seconds: float | None = None
    """Expected seconds until the whole run is done; None before anything was measured."""
    elapsed: float = 0.0
    """Seconds since the run began, loading included."""
    device: str = ""
    """Where it runs, such as "cuda:0"."""


OnEvent = Callable[[Event], None]
"""Called with every event of a run; may raise to cancel it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """The time, memory and work of one finished stage."""

    stage: str
    """The name of the stage."""
    seconds: float
    """Wall-clock time."""
    peak_bytes: int
    """The peak memory of the stage; 0 where the device does not report one."""
    tiles: int
    """Tiles evaluated."""
    retries: int = 0
    """Retries with less memory after an out-of-memory error."""
    recomputed: int = 0
    """Tiles and bands that overflowed in half precision and were computed again in float32."""
