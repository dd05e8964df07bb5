"""What a denoiser is told besides the noisy latents, and how it follows a tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hires.tiling.geometry import Box, Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Text and size conditions of a batch of B pictures.

    tokens (B, T, D); mask (B, T) or None; pooled (B, P) or None; image_latents (B, C, h, w) or None, cropped with the
    tile; size_ids (B, 6) or None: SDXL's original height, width, crop top, left, target height, width, in pixels.
    `cell_px` is how many pixels one latent cell covers.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    image_latents: Tensor | None = None
    size_ids: Tensor | None = None
    cell_px: int = 8

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def crop(self, box: Box) -> Conditioning:
        """The conditions of a tile: crop offsets move with it, original and target size stay the canvas's."""
        ids, latents = self.size_ids, self.image_latents
        if ids is not None and (box.top or box.left):
            ids = ids.clone()
            ids[:, 2] += box.top * self.cell_px
            ids[:, 3] += box.left * self.cell_px
        if latents is not None:
            latents = latents[..., box.rows, box.cols]
        return replace(self, size_ids=ids, image_latents=latents)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """On a device; size ids stay float32, they hold pixels."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, dtype)

        ids = None if self.size_ids is None else self.size_ids.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        tokens = self.tokens.to(device, dtype)
        return replace(
            self, tokens=tokens, mask=mask, pooled=move(self.pooled), image_latents=move(self.image_latents), size_ids=ids
        )


def sdxl_size_ids(canvas_px: Size, batch: int = 1) -> Tensor:
    """Size ids of a whole canvas, (batch, 6): original and target are the canvas, the crop starts at 0, 0.

    A tile of it keeps both sizes and moves the crop, as DemoFusion does (arXiv 2311.16973).
    """
    h, w = canvas_px.height, canvas_px.width
    return torch.tensor([[h, w, 0, 0, h, w]], dtype=torch.float32).repeat(batch, 1)


def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
    """One batch from several, in order; parts must agree on which fields they have."""
    if len(parts) == 1:
        return parts[0]

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        assert len(present) in (0, len(values)), "conditionings disagree on which fields they have"
        return torch.cat(present) if present else None

    return replace(
        parts[0],
        tokens=torch.cat([part.tokens for part in parts]),
        mask=joined([part.mask for part in parts]),
        pooled=joined([part.pooled for part in parts]),
        image_latents=joined([part.image_latents for part in parts]),
        size_ids=joined([part.size_ids for part in parts]),
    )
