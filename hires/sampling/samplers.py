"""Samplers and schedules by name.

A sampler is a function `sampler(denoise, x, sigmas, cond, noise, on_step) -> latents`: x is (B, C, h, w) at noise level
sigmas[0], the result are the latents at sigmas[-1]. A sampler sees no tiles. All noise is drawn on the canvas, so it does not
depend on tiles, batches or threads. Names, costs and valid combinations, and what a new sampler takes, are in `registry.py`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor

from hires.errors import RequestError
from hires.sampling import schedules
from hires.sampling.base import Sampler
from hires.sampling.dpm_solver import dpm_adaptive, dpm_fast
from hires.sampling.multi_step import dpmpp_2m, dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, lms, unipc
from hires.sampling.registry import find_sampler_name, find_schedule_name
from hires.sampling.restart import restart
from hires.sampling.schedules import Levels, Table, make_levels
from hires.sampling.single_step import (
    ddim,
    dpm_2,
    dpm_2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    tcd,
)

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm_2": dpm_2,
    "dpm_2_ancestral": dpm_2_ancestral,
    "lms": lms,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "dpm_fast": dpm_fast,
    "dpm_adaptive": dpm_adaptive,
    "restart": restart,
    "unipc": unipc,
    "ddim": ddim,
    "lcm": lcm,
    "tcd": tcd,
}


def find_sampler(name: str) -> Sampler:
    """The sampler of a name or alias. RequestError, with the known names, for an unknown one."""
    return SAMPLERS[find_sampler_name(name)[0]]


class Schedule(Protocol):
    """A noise schedule as a tensor; see `schedules.Levels`."""

    def __call__(self, steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, **shape: float) -> Tensor:
        """The noise levels, (steps + 1,) float32."""
        ...


def make_sigmas(schedule: str, steps: int, **where: Any) -> Tensor:
    """`make_levels` as a tensor (steps + 1,) float32; the same arguments and errors."""
    return as_sigmas(make_levels(schedule, steps, **where))


def as_sigmas(levels: list[float]) -> Tensor:
    """Noise levels as a float32 tensor."""
    return torch.tensor(levels, dtype=torch.float64).float()


def strength_sigmas(sigmas: Tensor, strength: float) -> Tensor:
    """The last int(n strength) steps of a schedule of n, for img2img. RequestError if no step is left."""
    steps = len(sigmas) - 1
    if not 0 <= strength <= 1:
        raise RequestError(f"strength {strength:g}: give a number from 0 to 1")
    remaining = int(steps * strength)
    if remaining < 1:
        raise RequestError(
            f"strength {strength:g} leaves none of {steps} steps: give a strength of at least {1 / steps:.3g}, or more steps"
        )
    return sigmas[steps - remaining :]


def _tensor(make: Levels) -> Schedule:
    @wraps(make)
    def schedule(steps: int, sigma_min: float, sigma_max: float, table: Table | None = None, **shape: float) -> Tensor:
        return as_sigmas(make(steps, sigma_min, sigma_max, table, **shape))

    return schedule


SCHEDULES: dict[str, Schedule] = {name: _tensor(make) for name, make in schedules.LEVELS.items()}
karras, exponential, polyexponential, cosine = (
    SCHEDULES[name] for name in ("karras", "exponential", "polyexponential", "cosine")
)


def find_schedule(name: str) -> Schedule:
    """The schedule of a name or alias. RequestError, with the known names, for an unknown one."""
    return SCHEDULES[find_schedule_name(name)]
