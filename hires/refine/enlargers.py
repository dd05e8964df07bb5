"""Enlargers: turn the latents of one stage into the start of the next.

Every enlarger has the signature `enlarge(codec, latents, target) -> latents`, (B, C, h, w) to (B, C, target.cells), on the
CPU or the codec's device. Enlarging pixels keeps edges in place, enlarging latents keeps their statistics; `mix` combines the
two by frequency.
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
    """A loaded model as converter between latents and pixels."""

    def decode_bands(self, latents: Tensor, on_band: OnBand) -> Iterator[Tensor]:
        """Finished rows (B, 3, rows, W) in about [-1, 1], top to bottom."""
        ...

    def encode(self, source: PixelSource, on_band: OnBand) -> Tensor:
        """The latents (B, C, h, w) of a picture."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """The size to enlarge to, and the progress callbacks."""

    canvas: Size
    """The canvas in pixels."""
    cells: Size
    """The canvas in latent cells."""
    decoding: OnBand
    """Called after each decoded band."""
    encoding: OnBand
    """Called after each encoded band."""


Enlarger = Callable[[Codec, Tensor, Target], Tensor]


def latent(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Enlarge the latents by bicubic: no decoding, softer edges."""
    view = Enlarged(latents, *relay_view(Size(latents.shape[-2], latents.shape[-1]), target.cells))
    return view.crop(Box(0, 0, target.cells.height, target.cells.width))


def pixel(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Decode, enlarge by bicubic, encode. The enlarged picture is never held whole."""
    return codec.encode(_picture(codec, latents, target, "bicubic"), target.encoding)


def lanczos(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Decode, enlarge by Lanczos, encode."""
    return codec.encode(_picture(codec, latents, target, "lanczos"), target.encoding)


def unsharp(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """Decode, enlarge by bicubic, sharpen against the softness of enlarging, encode (DiffuseHigh, 2406.18459)."""
    return codec.encode(Sharpened(_picture(codec, latents, target, "bicubic")), target.encoding)


def mix(codec: Codec, latents: Tensor, target: Target) -> Tensor:
    """The low band of `latent` and the high band of `pixel`, split at 8 cells (ScaleDiff, 2510.25818)."""
    return frequency_mix(latent(codec, latents, target), pixel(codec, latents, target).to(latents), Area(8))


ENLARGERS: dict[str, Enlarger] = {"latent": latent, "pixel": pixel, "lanczos": lanczos, "unsharp": unsharp, "mix": mix}


def frequency_mix(latent_up: Tensor, pixel_up: Tensor, low_pass: LowPass) -> Tensor:
    """LP(latent_up) + (pixel_up - LP(pixel_up)): statistics of the enlarged latents, edges of the enlarged picture."""
    return pixel_up + low_pass(latent_up - pixel_up)


def _picture(codec: Codec, latents: Tensor, target: Target, kernel: str) -> Enlarged:
    """The decoded picture, enlarged to the target's canvas."""
    picture = torch.cat([rows.float().cpu() for rows in codec.decode_bands(latents, target.decoding)], dim=-2)
    return Enlarged(picture, *relay_view(Size(picture.shape[-2], picture.shape[-1]), target.canvas), kernel)


@dataclass(frozen=True, slots=True)
class Sharpened:
    """A picture sharpened by an unsharp mask; any box of it equals that part of the whole."""

    source: PixelSource
    """The picture to sharpen."""
    amount: float = 1.0
    """How much of the detail above the Gaussian is added."""
    std: float = 1.0
    """The standard deviation of the Gaussian in pixels."""

    @property
    def size(self) -> Size:
        """The size of the source."""
        return self.source.size

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, C, part.height, part.width); the picture's edges are repeated."""
        reach, size = math.ceil(3 * self.std), self.source.size
        top, left = max(0, part.top - reach), max(0, part.left - reach)
        bottom, right = min(size.height, part.bottom + reach), min(size.width, part.right + reach)
        read = self.source.crop(Box(top, left, bottom - top, right - left)).float()
        padding = (reach - part.left + left, reach - right + part.right, reach - part.top + top, reach - bottom + part.bottom)
        around = F.pad(read, padding, mode="replicate")
        taps = torch.exp(-(torch.arange(-reach, reach + 1, device=read.device) ** 2) / (2 * self.std**2))
        taps = (taps / taps.sum()).expand(read.shape[1], 1, 1, -1)
        blurred = F.conv2d(F.conv2d(around, taps, groups=len(taps)), taps.mT, groups=len(taps))
        inner = around[..., reach : reach + part.height, reach : reach + part.width]
        return inner + self.amount * (inner - blurred)
