"""Rules for the noise that an enlarged picture gets before it is refined.

A relay stage starts at x = enlarged + sigma n: enough noise for new detail, not so much that the picture is lost. Sigmas are
in the variance-exploding form, as everywhere.
"""

from __future__ import annotations

import math

from hires.errors import RequestError, unknown
from hires.tiling.geometry import Size

RULES = ("fixed", "area")


def area_rule(sigma_end: float, before: Size, after: Size, gamma: float = 1.5) -> float:
    """sigma_end m^(gamma / 2), with m the factor by which the sides grow (FreCaS).

    Averaged over the same part of the picture, noise of one sigma is weaker on a larger canvas; the rule makes up for it, and
    gamma = 2 keeps the signal-to-noise ratio of the mean of m x m cells. In FreCaS's own form (2410.18410) it reads
    abar' = s abar / (1 + (s - 1) abar), s = m^-gamma, with sigma_end 0.57 (t = 200 of SDXL), gamma 1.5 to 2K and 2 to 4K.
    """
    factor = math.sqrt(after.area / before.area)
    return float(sigma_end * factor ** (gamma / 2))


def relay_sigma(rule: str, sigma: float, before: Size, after: Size, *, sigma_max: float, gamma: float = 1.5) -> float:
    """The noise level at which a stage begins, at most the model's `sigma_max`.

    Rule "fixed" gives `sigma` itself, "area" gives `area_rule(sigma, …)`. RequestError for an unknown rule or an invalid
    sigma.
    """
    if rule not in RULES:
        raise RequestError(unknown("re-noise rule", rule, RULES))
    if not (math.isfinite(sigma) and sigma > 0):
        raise RequestError(f"relay sigma {sigma:g}: give a noise level above 0, such as 1")
    return min(sigma_max, sigma if rule == "fixed" else area_rule(sigma, before, after, gamma))
