"""Classifier-free guidance (CFG): the estimates with and without the prompt, combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hires.errors import RequestError
from hires.protocols import Condition, Denoiser, LowPass
from hires.sampling.conditioning import Conditioning


def edit_guided(
    denoise: Denoiser, image_only: Conditioning, uncond: Conditioning, scale: float, image_scale: float
) -> Denoiser:
    """D = D_u + scale (D_full - D_image) + image_scale (D_image - D_u), one batch of 3B (Brooks et al. 2023, eq. 3).

    image_only: the image and the negative prompt. uncond: the negative prompt and an image of zeros.
    """

    def guide(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        full, image, none = denoise(x.repeat(3, 1, 1, 1), sigma, cond.concatenate(image_only, uncond)).chunk(3)
        return none + scale * (full - image) + image_scale * (image - none)

    return guide


def within(inside: Denoiser, outside: Denoiser, low: float, high: float) -> Denoiser:
    """`inside` for low < sigma <= high, `outside` elsewhere; each step evaluates only one of them."""

    def choose(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        return (inside if low < sigma <= high else outside)(x, sigma, cond)

    return choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """D = D_u + low LP(D_c - D_u) + high (1 - LP)(D_c - D_u), from the estimates with (D_c) and without (D_u) the prompt.

    low = high is classifier-free guidance and needs no low-pass. FreCaS uses 7.5 and 35, HiWave 1 and 7.5 (2410.18410,
    2506.20452). RequestError for invalid values.
    """

    low: float
    """The scale of the low band."""
    high: float
    """The scale of the high band."""
    low_pass: LowPass | None = None
    """Splits the bands; needed if low and high differ."""
    rescale: float = 0.0
    """Lin et al.'s phi (2305.08891, eq. 15 and 16), from 0 to 1; applied to the denoised estimate of each picture."""
    interval: tuple[float, float] = (0.0, math.inf)
    """The sigmas (low, high] with guidance; elsewhere D_c alone, at half the cost (Kynkäänniemi et al. 2024, 2404.07724)."""

    def __post_init__(self) -> None:
        if self.low != self.high and self.low_pass is None:
            raise RequestError(f"guidance {self.low:g} below and {self.high:g} above: give the low-pass that splits the bands")
        if not 0 <= self.rescale <= 1:
            raise RequestError(f"guidance rescale {self.rescale:g}: give a share from 0 to 1")
        if not 0 <= self.interval[0] < self.interval[1]:
            raise RequestError(f"guidance interval {self.interval}: give a lower and a higher sigma")

    @property
    def plain(self) -> bool:
        """Whether the result is the prompt's estimate alone."""
        return self.low == self.high == 1.0

    def needs_uncond(self, sigma: float) -> bool:
        """Whether a step at that noise level needs the estimate without the prompt."""
        return not self.plain and self.interval[0] < sigma <= self.interval[1]

    def combined(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The guided estimate from the two estimates, (B, C, h, w) each."""
        delta = conditional - unconditional
        estimate = unconditional + self.high * delta
        if self.low != self.high and self.low_pass is not None:
            estimate = estimate + (self.low - self.high) * self.low_pass(delta)
        return rescaled(estimate, conditional, self.rescale) if self.rescale else estimate


def rescaled(estimate: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Share estimate std(conditional) / std(estimate) + (1 - share) estimate (Lin et al. 2023); std of each picture."""
    dims = (1, 2, 3)
    scale = conditional.std(dims, keepdim=True) / estimate.std(dims, keepdim=True).clamp_min(1e-12)
    return estimate * (share * scale + (1 - share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Prompts for regions of the canvas. Every one is evaluated on the whole canvas.

    Where the masks add up to less than 1, the prompt of the whole picture gets the rest. RequestError for masks that add up
    to more than 1, or whose number differs from that of the prompts.
    """

    conds: tuple[Conditioning, ...]
    """The prompt of each region."""
    masks: tuple[Tensor, ...]
    """The share of each region's prompt at every cell, (1 or B, 1, h, w) in [0, 1]."""

    def __post_init__(self) -> None:
        if len(self.conds) != len(self.masks):
            raise RequestError(f"{len(self.conds)} regional prompts and {len(self.masks)} masks: give a mask for each prompt")
        total = sum(self.masks, torch.zeros(()))
        if self.masks and not (min(float(m.min()) for m in self.masks) >= 0 and float(total.max()) <= 1 + 1e-5):
            raise RequestError(f"regional masks add up to {float(total.max()):g}: give values from 0 that add up to 1 at most")

    def mixed(self, whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """One estimate from that of the whole picture's prompt and those of the regions, (B, C, h, w) each."""
        pairs = zip(parts, self.masks, strict=True)
        return whole + sum((mask * (part - whole) for part, mask in pairs), torch.zeros_like(whole))


NO_REGIONS = Regions(conds=(), masks=())


def guided(denoise: Denoiser, uncond: Conditioning, guidance: Guidance, regions: Regions | None = None) -> Denoiser:
    """A guided denoiser: one batch of 2B inside the guidance interval, else of B.

    Each region adds B to the batch.
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


def composed(
    denoise: Denoiser, parts: Sequence[tuple[Conditioning, float]], uncond: Conditioning, guidance: Guidance
) -> Denoiser:
    """Guidance by several prompts: D_c = D_u + sum_i w_i (D_i - D_u) in place of the prompt's own estimate.

    Composable diffusion (Liu et al. 2022, arXiv 2206.01714, eq. 11); at most two conditions are evaluated at once, as with
    one prompt. parts: the condition and weight of each prompt.
    """
    conds = [*(cond for cond, _ in parts), uncond]
    pairs = [conds[i : i + 2] for i in range(0, len(conds), 2)]

    def guide(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        estimates: list[Tensor] = []
        for first, *second in pairs:
            count = 1 + len(second)
            estimates += denoise(x.repeat(count, 1, 1, 1), sigma, first.concatenate(*second)).chunk(count)
        *of_parts, unconditional = estimates
        whole = unconditional
        for estimate, (_, weight) in zip(of_parts, parts, strict=True):
            whole = whole + weight * (estimate - unconditional)
        return guidance.combined(whole, unconditional) if guidance.needs_uncond(sigma) else whole

    return guide
