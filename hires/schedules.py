"""Noise levels: from `sigma_max` down to `sigma_min`, then 0. float64 inside, float32 out, (steps + 1,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hires.errors import RequestError, unknown

Schedule = Callable[[int, float, float], Tensor]


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """sigma_i = (max^(1/rho) + i/(n-1) (min^(1/rho) - max^(1/rho)))^rho (Karras et al. 2022, eq. 5)."""
    ramp = _ramp(steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _closed((high + ramp * (low - high)) ** rho)


def exponential(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """sigma_i = max (min / max)^(i/(n-1)): equal steps of ln sigma, as recommended for CosXL."""
    return _closed(sigma_max * (sigma_min / sigma_max) ** _ramp(steps))


def _ramp(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps, dtype=torch.float64)


def _closed(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


SCHEDULES: dict[str, Schedule] = {"karras": karras, "exponential": exponential}


def find_schedule(name: str) -> Schedule:
    """The schedule of that name; RequestError lists the known ones."""
    if name not in SCHEDULES:
        raise RequestError(unknown("schedule", name, SCHEDULES))
    return SCHEDULES[name]
