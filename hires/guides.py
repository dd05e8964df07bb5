"""Guides: wrappers of the whole canvas's estimate, `denoise(x, sigma, cond) -> denoised`, (B, C, h, w) float32.

Guidance policies decide how the estimates with and without the prompt are combined and when the second one is worth its
cost; anchors hold the estimate to a reference: the picture of the stage before, enlarged. All of them are about the picture as
a whole, so they go outside `tiled`, which sees every one of them as one denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hires.conditioning import Conditioning
from hires.errors import RequestError
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


def within(inside: Denoiser, outside: Denoiser, low: float, high: float) -> Denoiser:
    """`inside` for low < sigma <= high, `outside` elsewhere; only one of the two is evaluated."""

    def choose(x: Tensor, sigma: float, cond: Any) -> Tensor:
        return (inside if low < sigma <= high else outside)(x, sigma, cond)

    return choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """How the estimates with the prompt, D_c, and without, D_u, become one: D_u + low LP(D_c - D_u) + high (the rest of it).

    low = high is classifier-free guidance, and needs no low-pass; FreCaS takes 7.5 and 35, HiWave 1 and 7.5 (2410.18410,
    2506.20452). rescale: Lin et al.'s phi (2305.08891, eq. 15 and 16), here on the denoised estimate, per picture. Outside
    `interval`, (low, high], the prompt's estimate stands alone and costs half (Kynkäänniemi et al. 2024, 2404.07724).
    """

    low: float
    high: float
    low_pass: LowPass | None = None
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        if self.low != self.high and self.low_pass is None:
            raise RequestError(f"guidance {self.low:g} below and {self.high:g} above: give the low-pass that divides them")
        if not 0 <= self.rescale <= 1:
            raise RequestError(f"guidance rescale {self.rescale:g}: give a share from 0 to 1")
        if not 0 <= self.interval[0] < self.interval[1]:
            raise RequestError(f"guidance interval {self.interval}: give a lower and a higher sigma")

    @property
    def plain(self) -> bool:
        """Whether the prompt's estimate is all there is to it."""
        return self.low == self.high == 1.0

    def needs_uncond(self, sigma: float) -> bool:
        """Whether a step at that noise level evaluates the estimate without the prompt."""
        return not self.plain and self.interval[0] < sigma <= self.interval[1]

    def combined(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """One estimate of two, (B, C, h, w) each."""
        delta = conditional - unconditional
        estimate = unconditional + self.high * delta
        if self.low != self.high and self.low_pass is not None:
            estimate = estimate + (self.low - self.high) * self.low_pass(delta)
        return rescaled(estimate, conditional, self.rescale) if self.rescale else estimate


def rescaled(estimate: Tensor, conditional: Tensor, share: float) -> Tensor:
    """share estimate std(conditional) / std(estimate) + (1 - share) estimate, deviations of each picture (Lin et al. 2023)."""
    dims = (1, 2, 3)
    scale = conditional.std(dims, keepdim=True) / estimate.std(dims, keepdim=True).clamp_min(1e-12)
    return estimate * (share * scale + (1 - share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Prompts of parts of the canvas, over that of the whole: conds[i] draws where masks[i], (1 or B, 1, h, w) in [0, 1], is 1.

    Where masks leave something of 1 the prompt of the whole has it. Every region is evaluated on the whole canvas.
    """

    conds: tuple[Conditioning, ...]
    masks: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.conds) != len(self.masks):
            raise RequestError(f"{len(self.conds)} regional prompts and {len(self.masks)} masks: give a mask for each prompt")
        total = sum(self.masks, torch.zeros(()))
        if self.masks and not (min(float(m.min()) for m in self.masks) >= 0 and float(total.max()) <= 1 + 1e-5):
            raise RequestError(f"regional masks add up to {float(total.max()):g}: give values from 0 that add up to 1 at most")

    def mixed(self, whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """The estimate of the whole's prompt and those of the regions', (B, C, h, w) each, as one."""
        pairs = zip(parts, self.masks, strict=True)
        return whole + sum((mask * (part - whole) for part, mask in pairs), torch.zeros_like(whole))


NO_REGIONS = Regions(conds=(), masks=())


def guided_by(denoise: Denoiser, uncond: Conditioning, guidance: Guidance, regions: Regions | None = None) -> Denoiser:
    """A denoiser guided as the policy says: two estimates in one batch of 2B inside its interval, else one of B.

    regions: one estimate more for each.
    """
    if guidance.plain and regions is None:
        return denoise
    parts = NO_REGIONS if regions is None else regions

    def prompted(x: Tensor, sigma: float, conds: list[Conditioning]) -> tuple[Tensor, ...]:
        return denoise(x.repeat(len(conds), 1, 1, 1), sigma, conds[0].concatenate(*conds[1:])).chunk(len(conds))

    def alone(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        whole, *others = prompted(x, sigma, [cond, *parts.conds])
        return parts.mixed(whole, others) if others else whole

    def both(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        whole, *others, unconditional = prompted(x, sigma, [cond, *parts.conds, uncond])
        return guidance.combined(parts.mixed(whole, others) if others else whole, unconditional)

    return alone if guidance.plain else within(both, alone, *guidance.interval)
