"""Noise levels as tensors: `levels.py` in float32, (steps + 1,), ending with 0; computed in float64."""

from __future__ import annotations

from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from hires import levels
from hires.catalogue import find_schedule_name
from hires.errors import RequestError
from hires.levels import Levels, Table, make_levels


class Schedule(Protocol):
    def __call__(
        self, steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, **shape: float
    ) -> Tensor: ...


def make_sigmas(schedule: str, steps: int, **where: Any) -> Tensor:
    """`make_levels` as a tensor (steps + 1,) float32; the same arguments and errors."""
    return as_sigmas(make_levels(schedule, steps, **where))


def as_sigmas(found: list[float]) -> Tensor:
    return torch.tensor(found, dtype=torch.float64).float()


def strength_sigmas(sigmas: Tensor, strength: float) -> Tensor:
    """The last int(n strength) steps of a schedule of n: where img2img begins. RequestError where that is none."""
    steps = len(sigmas) - 1
    if not 0 <= strength <= 1:
        raise RequestError(f"--strength {strength:g}: give a number from 0 to 1")
    kept = int(steps * strength)
    if kept < 1:
        raise RequestError(
            f"--strength {strength:g} leaves none of {steps} steps: give a strength of at least {1 / steps:.3g}, or more steps"
        )
    return sigmas[steps - kept :]


def _tensor(make: Levels) -> Schedule:
    @wraps(make)
    def schedule(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, **shape: float) -> Tensor:
        return as_sigmas(make(steps, sigma_min, sigma_max, table, **shape))

    return schedule


SCHEDULES: dict[str, Schedule] = {name: _tensor(make) for name, make in levels.LEVELS.items()}
karras, exponential, polyexponential, cosine = (
    SCHEDULES[name] for name in ("karras", "exponential", "polyexponential", "cosine")
)


def find_schedule(name: str) -> Schedule:
    """The schedule of that name or alias; RequestError lists the known ones."""
    return SCHEDULES[find_schedule_name(name)]
