"""Enlargers: from the latents of one stage to those that the next begins with. Plug-ins of one signature.

`enlarge(codec, latents, target) -> latents`: (B, C, h, w) to (B, C, target.cells), on the CPU or the codec's device. What goes
through pixels keeps edges where they are, what stays in latents keeps their statistics; `mix` takes each from where it is good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.protocols import LowPass
from hires.refine.low_pass import Area
from hires.tiling.geometry import Box, Size, relay_view
from hires.tiling.resize import Enlarged
from hires.tiling.vae import OnBand, PixelSource


class Codec(Protocol):
    """What turns latents into pixels and back: a loaded model does."""

    def decode_bands(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        """Finished rows (B, 3, rows, W) in about [-1, 1], top to bottom."""
        ...

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        """A picture to latents (B, C, h, w)."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where an enlargement goes: the canvas in pixels and in cells, and who hears of the bands on the way."""

    canvas: Size
    cells: Size
    decoding: OnBand
    encoding: OnBand


Enlarger = Callable[[Codec, Tensor, Target], Tensor]


def latent(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Bicubic on the latents: no decoding, softer edges."""
    view = Enlarged(latents, *relay_view(Size(latents.shape[-2], latents.shape[-1]), target.cells))
    return view.crop(Box(0, 0, target.cells.height, target.cells.width))


def pixel(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Decode, enlarge by bicubic, encode; the enlarged picture is never held whole."""
    return codec.encode(_picture(codec, latents, target, "bicubic"), target.encoding)


def lanczos(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Decode, enlarge by Lanczos, encode."""
    return codec.encode(_picture(codec, latents, target, "lanczos"), target.encoding)


def unsharp(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Decode, enlarge by bicubic and sharpen, encode: DiffuseHigh's (2406.18459), against the softness of enlarged pictures."""
    return codec.encode(Sharpened(_picture(codec, latents, target, "bicubic")), target.encoding)


def mix(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """ScaleDiff's latent frequency mix of `latent` and `pixel`, with a low-pass of 8 cells (2510.25818)."""
    return frequency_mix(latent(codec, latents, target), pixel(codec, latents, target).to(latents), Area(8))


ENLARGERS: dict[str, Enlarger] = {"latent": latent, "pixel": pixel, "lanczos": lanczos, "unsharp": unsharp, "mix": mix}


def frequency_mix(latent_up: Tensor, pixel_up: Tensor, low_pass: LowPass) -> Tensor:
    """LP(latent_up) + (pixel_up - LP(pixel_up)): statistics of the latents enlarged, edges of the picture enlarged."""
    return pixel_up + low_pass(latent_up - pixel_up)


def _picture(codec: Codec, latents: Tensor, target: Target, kernel: str) -> Enlarged:
    """The picture of the latents as it is seen at the target's canvas."""
    picture = torch.cat([rows.float().cpu() for rows in codec.decode_bands(latents, target.decoding)], dim=-2)
    return Enlarged(picture, *relay_view(Size(picture.shape[-2], picture.shape[-1]), target.canvas), kernel)


@dataclass(frozen=True, slots=True)
class Sharpened:
    """A picture plus `amount` of what a Gaussian of `std` pixels takes away from it; box by box the same as whole."""

    source: PixelSource
    amount: float = 1.0
    std: float = 1.0

    @property
    def size(self) -> Size:
        return self.source.size

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, C, part.height, part.width); edges of the picture are repeated."""
        reach, size = math.ceil(3 * self.std), self.source.size
        top, left = max(0, part.top - reach), max(0, part.left - reach)
        bottom, right = min(size.height, part.bottom + reach), min(size.width, part.right + reach)
        seen = self.source.crop(Box(top, left, bottom - top, right - left)).float()
        lacking = (reach - part.left + left, reach - right + part.right, reach - part.top + top, reach - bottom + part.bottom)
        around = F.pad(seen, lacking, mode="replicate")
        taps = torch.exp(-(torch.arange(-reach, reach + 1, device=seen.device) ** 2) / (2 * self.std**2))
        taps = (taps / taps.sum()).expand(seen.shape[1], 1, 1, -1)
        blurred = F.conv2d(F.conv2d(around, taps, groups=len(taps)), taps.mT, groups=len(taps))
        inner = around[..., reach : reach + part.height, reach : reach + part.width]
        return inner + self.amount * (inner - blurred)
