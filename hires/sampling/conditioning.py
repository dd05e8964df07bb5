"""The conditions of a denoiser besides the noisy latents, cropped to tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hires.tiling.geometry import Box, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Text and size conditions of a batch of B pictures; a `protocols.Condition`."""

    tokens: Tensor
    """The text encoders' embeddings of each token, (B, T, D)."""
    mask: Tensor | None = None
    """Which tokens are not padding, (B, T)."""
    pooled: Tensor | None = None
    """The pooled text embedding, (B, P)."""
    image_latents: Tensor | None = None
    """Latents of a conditioning image, (B, C, h, w), cropped with the tile."""
    size_ids: Tensor | None = None
    """SDXL's original height, width, crop top, left, target height, width in pixels, (B, 6)."""
    resolution: Tensor | None = None
    """PixArt-α's height and width in pixels, (B, 2)."""
    guidance: Tensor | None = None
    """The embedding of the guidance scale of an LCM that is told it, (B, W)."""
    canvas: Size | None = None
    """The whole picture in latent cells, for networks that must know where a tile lies on it."""
    places: tuple[Box, ...] | None = None
    """The box of each picture on the canvas, in cells; None if each is the whole canvas."""
    cell_px: int = 8
    """Pixels per latent cell."""

    @property
    def batch(self) -> int:
        """The number of pictures."""
        return self.tokens.shape[0]

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The box of each picture on the canvas, in cells; only with a canvas."""
        assert self.canvas is not None, "these conditions have no canvas"
        return self.places or (Box(0, 0, self.canvas.height, self.canvas.width),) * self.batch

    def crop(self, box: Box) -> Conditioning:
        """The conditions of a tile, a box of these pictures in cells.

        SDXL's crop offsets move with the tile; its original and target size stay those of the canvas. PixArt's resolution
        becomes that of the tile: it was trained on whole pictures and has no notion of a crop.
        """
        ids, latents = self.size_ids, self.image_latents
        if ids is not None and (box.top or box.left):
            ids = ids.clone()
            ids[:, 2] += box.top * self.cell_px
            ids[:, 3] += box.left * self.cell_px
        if latents is not None:
            latents = latents[..., box.rows, box.cols]
        resolution, places = self.resolution, self.places
        if resolution is not None:
            sides = [box.height * self.cell_px, box.width * self.cell_px]
            resolution = resolution.new_tensor(sides).repeat(self.batch, 1)
        if self.canvas is not None:
            places = tuple(Box(b.top + box.top, b.left + box.left, box.height, box.width) for b in self.boxes)
        return replace(self, size_ids=ids, image_latents=latents, resolution=resolution, places=places)

    def pictures(self, start: int, stop: int) -> Conditioning:
        """The conditions of pictures start to stop - 1 of the batch."""
        if (start, stop) == (0, self.batch):
            return self

        def part(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[start:stop]

        return replace(
            self,
            tokens=self.tokens[start:stop],
            mask=part(self.mask),
            pooled=part(self.pooled),
            image_latents=part(self.image_latents),
            size_ids=part(self.size_ids),
            resolution=part(self.resolution),
            guidance=part(self.guidance),
            places=None if self.places is None else self.places[start:stop],
        )

    def concatenate(self, *others: Conditioning) -> Conditioning:
        """One batch of this and the other conditions, in order; all must have the same fields and the same canvas.

        Texts of different length are brought to one without a change of what they say, see `of_one_length`.
        """
        if not others:
            return self
        parts = of_one_length((self, *others))
        assert len({part.canvas for part in parts}) == 1, "the conditionings have different canvases"
        has_places = any(part.places is not None for part in parts)

        def joined(values: Sequence[Tensor | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            assert len(present) in (0, len(values)), "the conditionings have different fields"
            return torch.cat(present) if present else None

        return replace(
            self,
            tokens=torch.cat([part.tokens for part in parts]),
            mask=joined([part.mask for part in parts]),
            pooled=joined([part.pooled for part in parts]),
            image_latents=joined([part.image_latents for part in parts]),
            size_ids=joined([part.size_ids for part in parts]),
            resolution=joined([part.resolution for part in parts]),
            guidance=joined([part.guidance for part in parts]),
            places=tuple(box for part in parts for box in part.boxes) if has_places else None,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """The conditions on a device; size ids and resolutions stay float32 because they hold pixels."""

        def move(value: Tensor | None, to: torch.dtype | None = dtype) -> Tensor | None:
            return None if value is None else value.to(device, to)

        return replace(
            self,
            tokens=self.tokens.to(device, dtype),
            mask=move(self.mask, None),
            pooled=move(self.pooled),
            image_latents=move(self.image_latents),
            size_ids=move(self.size_ids, None),
            resolution=move(self.resolution, None),
            guidance=move(self.guidance),
        )


LONGEST_REPEAT = 4
"""How many times the longest text repeated texts may be; beyond it they are filled up and masked."""


def of_one_length(parts: Sequence[Conditioning]) -> tuple[Conditioning, ...]:
    """The same conditions with as many tokens each, to rounding what they were: attention is a mean over tokens.

    A text that is repeated whole gives the same mean. Where that makes the texts too long, they are filled with zeros, and a
    mask leaves these out.
    """
    lengths = [part.tokens.shape[1] for part in parts]
    longest, common = max(lengths), math.lcm(*lengths)
    if min(lengths) == longest:
        return tuple(parts)
    masked = any(part.mask is not None for part in parts)
    if not masked and common <= LONGEST_REPEAT * longest:
        return tuple(replace(part, tokens=part.tokens.repeat(1, common // part.tokens.shape[1], 1)) for part in parts)
    return tuple(_filled(part, longest) for part in parts)


def _filled(part: Conditioning, length: int) -> Conditioning:
    batch, count = part.tokens.shape[:2]
    given = part.tokens.new_ones((batch, count), dtype=torch.bool) if part.mask is None else part.mask
    tokens = F.pad(part.tokens, (0, 0, 0, length - count))
    return replace(part, tokens=tokens, mask=F.pad(given, (0, length - count)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCondition:
    """What SDXL is told about the size instead of the canvas; None for the canvas."""

    original: Size | None = None
    """The size of the picture before it was scaled for training."""
    target: Size | None = None
    """The size that it was cropped to."""
    crop: tuple[int, int] = (0, 0)
    """Where the crop began, (x, y) in px."""


def sdxl_size_ids(canvas_px: Size, batch: int = 1, told: SizeCondition | None = None) -> Tensor:
    """SDXL's size ids of a whole canvas, (batch, 6): original and target size are the canvas, the crop starts at 0, 0.

    A tile keeps both sizes and moves the crop, as in DemoFusion (arXiv 2311.16973). told: what is said instead.
    """
    told = SizeCondition() if told is None else told
    original, target = told.original or canvas_px, told.target or canvas_px
    left, top = told.crop
    ids = [[original.height, original.width, top, left, target.height, target.width]]
    return torch.tensor(ids, dtype=torch.float32).repeat(batch, 1)


def guidance_embedding(scale: float, width: int, batch: int = 1) -> Tensor:
    """[sin(1000 w f), cos(1000 w f)], (batch, width), with w = scale - 1 and f from 1 to 1/10000 (Luo et al. 2023, LCM)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (scale - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()])[None].repeat(batch, 1)


def pixart_resolution(canvas_px: Size, batch: int = 1) -> Tensor:
    """PixArt-α's size condition of whole pictures, (batch, 2): height and width in pixels."""
    return torch.tensor([[canvas_px.height, canvas_px.width]], dtype=torch.float32).repeat(batch, 1)
