"""Guides that hold the denoised estimate of a canvas to a reference picture.

A guide wraps `denoise(x, sigma, cond) -> denoised`, (B, C, h, w) float32. The reference is usually the enlarged picture of
the previous stage. Guides see the picture as a whole, so they go outside `tiled`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hires.protocols import Condition, Denoiser, LowPass

Strength = Callable[[float], float]
"""How strongly a guide acts at a noise level, from 0 to 1."""


def constant(value: float) -> Strength:
    """The same at every noise level."""
    return lambda sigma: value


def power_ramp(start: float, power: float = 1.0) -> Strength:
    """a(s) = min(1, s / start)^power: 1 at the start of a stage, falling to 0 with the noise."""
    return lambda sigma: min(1.0, sigma / start) ** power


def variance_ramp(start: float) -> Strength:
    """a(s) = [s^2 / (1 + s^2)] / [start^2 / (1 + start^2)], at most 1: ScaleDiff's (1 - abar) / (1 - abar_0), 2510.25818."""
    whole = start**2 / (1 + start**2)
    return lambda sigma: min(1.0, sigma**2 / (1 + sigma**2) / whole)


def structure_guided(denoise: Denoiser, reference: Tensor, strength: Strength, low_pass: LowPass) -> Denoiser:
    """D + a(s) (LP(reference) - LP(D)): pulls the low band to the reference and leaves the rest to the model.

    reference: (B or 1, C, h, w) of the canvas. With a = 1 and an idempotent low-pass the result has exactly the reference's
    low band; with `Wavelet(1)` that is DiffuseHigh's swap of the coarse band (2406.18459), in latents.
    """
    reference_low = low_pass(reference)

    def guide(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        estimate, a = denoise(x, sigma, cond), strength(sigma)
        return estimate if a == 0 else estimate + a * (reference_low - low_pass(estimate))

    return guide


def centre_pulled(
    denoise: Denoiser, reference: Tensor, sigma_ref: float, *, power: float = 4.0, sigma_least: float = 0.0
) -> Denoiser:
    """D - (D - reference) min(1, s / sigma_ref)^power for s above `sigma_least`: SUPIR's restoration guidance.

    reference: (B or 1, C, h, w) of the canvas. SUPIR uses power 4, sigma_ref 14.6 and sigma_least 0.05 (Yu et al. 2024,
    2401.13627).
    """
    pull = power_ramp(sigma_ref, power)

    def guide(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        estimate = denoise(x, sigma, cond)
        return estimate if sigma <= sigma_least else estimate + pull(sigma) * (reference - estimate)

    return guide


def masked(denoise: Denoiser, known: Tensor, drawn: Tensor) -> Denoiser:
    """M D + (1 - m) known: the model draws only where the mask is 1.

    known: the picture to keep, (B or 1, C, h, w). drawn: the mask m in [0, 1], (B or 1, 1, h, w). Where m = 0 the sampler
    ends exactly at `known`, and on the way its x is `known` plus noise of the current level, as the model was trained to see.
    """

    def guide(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        return torch.lerp(known.expand_as(x), denoise(x, sigma, cond), drawn.expand_as(x))  # exact where the mask is 0 or 1

    return guide
