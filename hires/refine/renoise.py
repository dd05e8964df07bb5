"""How much noise an enlarged picture is given before it is refined: enough for new detail, not enough to forget the picture.

A relay starts its stage at x = enlarged + sigma n. Sigmas are in the variance-exploding form, as everywhere.
"""

from __future__ import annotations

import math

from hires.errors import RequestError, unknown
from hires.tiling.geometry import Size

RULES = ("fixed", "area")


def area_rule(sigma_end: float, before: Size, after: Size, gamma: float = 1.5) -> float:
    """sigma_end m^(gamma / 2), m the factor by which sides grow: enlarging leaves less noise per area, FreCaS puts it back.

    abar' = s abar / (1 + (s - 1) abar), s = m^-gamma, in its own form (2410.18410); there sigma_end is 0.57 (t = 200 of SDXL),
    gamma 1.5 to 2K and 2 to 4K. gamma = 2 keeps the signal to noise ratio of what m x m cells average to.
    """
    factor = math.sqrt(after.area / before.area)
    return float(sigma_end * factor ** (gamma / 2))


def relay_sigma(rule: str, sigma: float, before: Size, after: Size, *, sigma_max: float, gamma: float = 1.5) -> float:
    """Where a stage begins: `sigma` under "fixed", `area_rule` from it under "area"; never above the model's `sigma_max`.

    RequestError for an unknown rule or a sigma that is none.
    """
    if rule not in RULES:
        raise RequestError(unknown("re-noise rule", rule, RULES))
    if not (math.isfinite(sigma) and sigma > 0):
        raise RequestError(f"relay sigma {sigma:g}: give a noise level above 0, such as 1")
    return min(sigma_max, sigma if rule == "fixed" else area_rule(sigma, before, after, gamma))
