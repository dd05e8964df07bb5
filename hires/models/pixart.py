"""PixArt's transformer (α, Σ, δ, DMD) as a network of the denoisers.

It is diffusers' module with two of its parts replaced.

Position embedding: computed on the whole canvas per axis and sliced for the tile, so that a tile knows where it lies.
Attention: through the dispatch, keys and values thinned where asked for. Nothing else of the module is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hires.kernels.attention_policies import Attending, everywhere
from hires.kernels.single_precision import in_single
from hires.models.adapters.controlnet import ControlBlock, attach, detach
from hires.models.attention_processors import DispatchedAttention
from hires.sampling.conditioning import Conditioning
from hires.tiling.geometry import Box, Size

POSITION_MODES = {"global": 1.0, "local": 0.0, "blend": 0.5}  # the share of the place on the canvas
TEXT_MULTIPLE = 8  # of keys, for masked attention kernels in half precision; T5's 300 tokens are none
DISCARD = -10000.0  # added to the scores of padding: finite, so that a text of nothing but padding gives no NaN


class PixArtNetwork:
    """A `Network`: scaled latents (B, C, h, w), time on the scale 0..999 (any float) and conditions to the noise in them.

    transformer: a PixArtTransformer2DModel; its `pos_embed` and attention processors are replaced. span: over how many
    units the position embedding runs per axis, whatever the size (32; 16 for PixArt-α 256). global_share: 1 places a tile
    where it lies on the canvas, 0 tells it that it is a whole picture, between the two blends the positions. thin: the
    factor per axis by which each block thins keys and values of self-attention, empty for dense attention. control: the
    copies of a ControlNet, which then need `image_latents`, the edges' own. The
    conditions need `canvas`, and `resolution` where the transformer takes it. h and w are multiples of the patch.
    """

    def __init__(
        self,
        transformer: Any,
        *,
        span: float,
        global_share: float = 1.0,
        thin: Sequence[int] = (),
        control: Sequence[ControlBlock] = (),
        backend: str | None = None,
    ) -> None:
        assert 0 <= global_share <= 1, global_share
        self.transformer, self.span, self.global_share = transformer, span, global_share
        self._channels, self._patch = transformer.config.in_channels, transformer.config.patch_size
        self._policy: Attending = everywhere
        detach(transformer)  # those of the session before
        transformer.pos_embed = PlacedPatches(transformer.pos_embed.proj)
        transformer.set_attn_processor(_processors(transformer, thin, backend, self._patch))
        modules: list[Any] = [module for block in control for module in block.modules() if hasattr(module, "set_processor")]
        for attn in modules:
            attn.set_processor(DispatchedAttention(backend, cells=self._patch))
        self._carrier = attach(transformer, control) if control else None

    def in_single(self) -> AbstractContextManager[None]:
        """Within, the transformer computes in float32 (see `single`)."""
        return in_single(self.transformer)

    def attending(self, policy: Attending) -> Self:
        """The same network, its self-attention by another policy, counted in latent cells; blocks that thin keep to theirs."""
        other = copy.copy(self)
        other._policy = policy
        return other

    def __call__(self, x: Tensor, time: float, cond: Conditioning) -> Tensor:
        """The output (B, C, h, w) at a timestep, without the channels of the learned variance."""
        assert x.shape[-2] % self._patch == 0 and x.shape[-1] % self._patch == 0, f"{tuple(x.shape)} is not whole patches"
        tokens, bias = padded_text(cond.tokens, cond.mask)
        if self._carrier is not None:
            assert cond.image_latents is not None, "a ControlNet follows edges"
            self._carrier.c = self.transformer.pos_embed(self._placed(cond.image_latents, cond))
        output: Tensor = self.transformer(
            self._placed(x, cond),
            encoder_hidden_states=tokens,
            timestep=torch.full((x.shape[0],), time, device=x.device),
            added_cond_kwargs=self._sizes(cond),
            cross_attention_kwargs={"canvas": (x.shape[-2], x.shape[-1]), "policy": self._policy(time)},
            encoder_attention_mask=bias,
            return_dict=False,
        )[0]
        return output[:, : self._channels]  # the rest is a learned variance, which no sampler here uses

    def _placed(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Latents with the two channels that say where they lie, float32."""
        return torch.cat([x.float(), self._positions(x, cond)], dim=1)

    def _positions(self, x: Tensor, cond: Conditioning) -> Tensor:
        assert cond.canvas is not None and cond.batch == x.shape[0], "conditions and latents disagree"
        assert all((box.height, box.width) == x.shape[-2:] for box in cond.boxes), "a tile is not where its conditions say"
        return positions(cond.boxes, cond.canvas, self.span, self.global_share, x.device)

    def _sizes(self, cond: Conditioning) -> dict[str, Tensor] | None:
        if not self.transformer.use_additional_conditions:
            return None
        assert cond.resolution is not None, "this checkpoint is conditioned on the resolution"
        return {"resolution": cond.resolution, "aspect_ratio": cond.resolution[:, :1] / cond.resolution[:, 1:]}


def _processors(transformer: Any, thin: Sequence[int], backend: str | None, patch: int) -> dict[str, DispatchedAttention]:
    """A processor by name for every attention of the transformer."""
    factors = tuple(thin) or (1,) * len(transformer.transformer_blocks)
    assert len(factors) == len(transformer.transformer_blocks), "one factor per block"
    result = {}
    for index, factor in enumerate(factors):
        result[f"transformer_blocks.{index}.attn1.processor"] = DispatchedAttention(backend, factor, patch)
        result[f"transformer_blocks.{index}.attn2.processor"] = DispatchedAttention(backend)
    return result


def positions(boxes: Sequence[Box], canvas: Size, span: float, global_share: float, device: torch.device) -> Tensor:
    """Where each cell of each box lies, (B, 2, h, w) float32: row and column on [0, span) of the canvas.

    A cell of row r lies at r * span / rows, which is PixArt's arange(n) / (n / base) / interpolation with span = base /
    interpolation. `global_share` below 1 moves it towards its place in a box that is taken for a canvas. Rows and columns
    are computed in float64 and then laid out.
    """

    def axis(start: int, length: int, whole: int) -> Tensor:
        along = torch.arange(length, dtype=torch.float64)
        return global_share * ((start + along) * span / whole) + (1 - global_share) * (along * span / length)

    rows = torch.stack([axis(box.top, box.height, canvas.height) for box in boxes]).float().to(device)
    cols = torch.stack([axis(box.left, box.width, canvas.width) for box in boxes]).float().to(device)
    h, w = rows.shape[1], cols.shape[1]
    return torch.stack([rows[:, :, None].expand(-1, h, w), cols[:, None, :].expand(-1, h, w)], dim=1)


class PlacedPatches(nn.Module):
    """diffusers' PatchEmbed with the same `proj`, whose positions come with the latents.

    The input is (B, C + 2, h, w): the two last channels of `positions` say where each cell lies. They travel with the batch
    because the transformer's forward hands this module nothing else; so tiles of different places make one batch, and
    there is no state between calls.
    """

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj
        self.single = False  # told so while the transformer computes in float32

    def forward(self, placed: Tensor) -> Tensor:
        """(B, C + 2, h, w) to tokens (B, h w / patch^2, D) in the weights' dtype; a patch lies where its first cell does."""
        dtype, patch = self.proj.weight.dtype, self.proj.kernel_size[0]
        latents = placed[:, :-2] if self.single else placed[:, :-2].to(dtype)
        maps = self.proj(latents).permute(0, 2, 3, 1)  # (B, rows, cols, D)
        dtype = maps.dtype
        half = maps.shape[-1] // 2
        rows = axis_embedding(placed[:, -2, ::patch, 0], half)[:, :, None]  # (B, rows, 1, D / 2)
        cols = axis_embedding(placed[:, -1, 0, ::patch], half)[:, None]  # (B, 1, cols, D / 2)
        return torch.cat([(maps[..., :half] + cols).to(dtype), (maps[..., half:] + rows).to(dtype)], dim=-1).flatten(1, 2)


def axis_embedding(places: Tensor, width: int) -> Tensor:
    """sin(p r_k) beside cos(p r_k), r_k = 10000^(-2k / width): places (B, n) to (B, n, width) float32, float64 inside."""
    rates = 1.0 / 10000 ** (torch.arange(width // 2, device=places.device, dtype=torch.float64) / (width / 2.0))
    angles = places.double()[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def padded_text(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, T, D) and mask (B, T) to a length that is a multiple of 8, and what to add to the scores, (B, 1, T').

    The padding's weight in the softmax is exactly zero.
    """
    extra = -tokens.shape[1] % TEXT_MULTIPLE
    if mask is None:
        if not extra:
            return tokens, None
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if extra:  # without any, padding would still copy
        tokens, mask = F.pad(tokens, (0, 0, 0, extra)), F.pad(mask.bool(), (0, extra))
    keep = mask.bool()
    bias = torch.zeros(keep.shape, dtype=tokens.dtype, device=tokens.device).masked_fill(~keep, DISCARD)
    return tokens, bias[:, None]
