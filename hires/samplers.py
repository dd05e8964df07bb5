"""Samplers as plain functions on the canvas: `sampler(denoise, x, sigmas, cond, noise, on_step) -> latents`.

x is (B, C, h, w) at noise level sigmas[0]; the result is the latents at sigmas[-1]. A sampler sees no tile. All noise is
drawn on the canvas, so it does not depend on tiles, batches or threads. Names, costs and combinations: `catalogue.py`.
"""

from __future__ import annotations

from hires.adaptive import dpm_adaptive, dpm_fast
from hires.catalogue import find_sampler_name
from hires.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_2m_sde_heun, dpmpp_3m_sde, lms, unipc
from hires.restart import restart
from hires.singlestep import ddim, dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, euler, euler_ancestral, heun, lcm
from hires.steps import Sampler

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
}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name or alias; RequestError lists the known ones."""
    return SAMPLERS[find_sampler_name(name)[0]]
