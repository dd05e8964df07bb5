"""Guides: wrappers of the whole canvas's estimate, `denoise(x, sigma, cond) -> denoised`, (B, C, h, w) float32.

Guidance policies decide how the estimates with and without the prompt are combined and when the second one is worth its
cost; anchors hold the estimate to a reference: the picture of the stage before, enlarged. All of them are about the picture as
a whole, so they go outside `tiled`, which sees every one of them as one denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hires.protocols import Denoiser, LowPass

Strength = Callable[[float], float]
"""How strongly a guide acts at a noise level: 0 not at all, 1 wholly."""


def constant(value: float) -> Strength:
    """The same at every noise level."""
    return lambda sigma: value


def power_ramp(start: float, power: float = 1.0) -> Strength:
    """a(s) = min(1, s / start)^power: 1 where a stage begins, falling to 0 with the noise."""
    return lambda sigma: min(1.0, sigma / start) ** power


def variance_ramp(start: float) -> Strength:
    """a(s) = [s^2 / (1 + s^2)] / [start^2 / (1 + start^2)], at most 1: ScaleDiff's (1 - abar) / (1 - abar_0), 2510.25818."""
    whole = start**2 / (1 + start**2)
    return lambda sigma: min(1.0, sigma**2 / (1 + sigma**2) / whole)


def structure_guided(denoise: Denoiser, reference: Tensor, strength: Strength, low_pass: LowPass) -> Denoiser:
    """D + a(s) (LP(reference) - LP(D)): the low band is drawn to the reference's, all above it is the model's own.

    reference: (B or 1, C, h, w) of the canvas. With a = 1 and an idempotent low-pass the result's low band is the reference's
    exactly; `Wavelet(1)` is then DiffuseHigh's swap of the coarse band (2406.18459), without a trip to pixels.
    """
    wanted = low_pass(reference)

    def guide(x: Tensor, sigma: float, cond: Any) -> Tensor:
        estimate, a = denoise(x, sigma, cond), strength(sigma)
        return estimate if a == 0 else estimate + a * (wanted - low_pass(estimate))

    return guide


def centre_pulled(
    denoise: Denoiser, reference: Tensor, sigma_ref: float, *, power: float = 4.0, sigma_least: float = 0.0
) -> Denoiser:
    """D - (D - reference) (s / sigma_ref)^power, above `sigma_least`, whole from sigma_ref up: SUPIR's restoration pull.

    reference: (B or 1, C, h, w) of the canvas (Yu et al. 2024, 2401.13627; there power 4 at sigma_ref 14.6, least 0.05).
    """
    pull = power_ramp(sigma_ref, power)

    def guide(x: Tensor, sigma: float, cond: Any) -> Tensor:
        estimate = denoise(x, sigma, cond)
        return estimate if sigma <= sigma_least else estimate + pull(sigma) * (reference - estimate)

    return guide


def masked(denoise: Denoiser, known: Tensor, drawn: Tensor) -> Denoiser:
    """m D + (1 - m) known: only what the mask covers is drawn, all else is known and shown to the model as such.

    known: (B or 1, C, h, w); drawn: the mask m in [0, 1], (B or 1, 1, h, w). Where m = 0 a sampler that ends at sigma 0 ends
    at `known`, and its x there is `known` plus noise of the level, as the model was trained to see it.
    """

    def guide(x: Tensor, sigma: float, cond: Any) -> Tensor:
        return known + drawn * (denoise(x, sigma, cond) - known)

    return guide
