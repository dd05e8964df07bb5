"""Noise levels of variance-preserving schedules, from their betas."""

from __future__ import annotations

import functools
import math

from hires.errors import ModelError

LEAST_ALPHA_BAR = 4.8973451890853435e-08  # what a rescaled schedule ends at instead of 0: sigma 4518.7


def vp_range(betas: tuple[str, float, float] | None, zero_snr: bool) -> tuple[float, float]:
    """Least and largest sigma of a variance-preserving schedule."""
    assert betas is not None, "a family has betas or a sigma range"
    sigmas = vp_sigmas(*betas, zero_snr=zero_snr)
    return sigmas[0], sigmas[-1]


@functools.lru_cache(maxsize=16)
def vp_sigmas(
    beta_schedule: str, beta_start: float, beta_end: float, count: int = 1000, *, zero_snr: bool = False
) -> tuple[float, ...]:
    """sigma_t = sqrt((1 - abar_t) / abar_t) of a variance-preserving schedule, rising with t (SDXL: 0.0292 to 14.61).

    zero_snr: sqrt(abar) is shifted and scaled so that it ends at 0 and starts where it did (Lin et al., arXiv 2305.08891);
    the last is held at LEAST_ALPHA_BAR, so that its sigma is a number.
    """
    if beta_schedule not in ("linear", "scaled_linear"):
        raise ModelError(f"beta schedule {beta_schedule!r} is not supported; supported: linear, scaled_linear")
    power = 2 if beta_schedule == "scaled_linear" else 1
    low, high = beta_start ** (1 / power), beta_end ** (1 / power)
    alphas, alpha_bar = [], 1.0
    for t in range(count):
        alpha_bar *= 1 - (low + (high - low) * t / (count - 1)) ** power
        alphas.append(alpha_bar)
    if zero_snr:
        first, last = math.sqrt(alphas[0]), math.sqrt(alphas[-1])
        roots = [(math.sqrt(alpha) - last) * first / (first - last) for alpha in alphas]
        alphas = [max(root**2, LEAST_ALPHA_BAR) for root in roots]
    return tuple(math.sqrt((1 - alpha) / alpha) for alpha in alphas)
