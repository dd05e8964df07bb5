"""Sends the attention of diffusers modules through `kernels.dispatch`.

By policies over the canvas, and with keys and values thinned where a model was trained so.

Where the tokens lie and by which policy they attend comes with every call, as diffusers' `cross_attention_kwargs`; a
processor knows how many latent cells one of its tokens stands for, and nothing is kept between calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hires.checkpoints.families import UNetShape
from hires.checkpoints.model import ModelSpec
from hires.errors import BackendError
from hires.kernels.attention_policies import Global, Policy
from hires.kernels.backends import BackendRefused
from hires.kernels.dispatch import AttentionSpec, attention, select
from hires.tiling.geometry import Size


def attention_backend(spec: ModelSpec, tile: Size, device: torch.device, dtype: torch.dtype, name: str | None = None) -> str:
    """Which backend runs the widest self-attention of a tile (in cells), by the dispatch's own rule or as named.

    BackendError with its reason where the named one cannot.
    """
    shape = spec.network
    if isinstance(shape, UNetShape):
        level = next((i for i in range(len(shape.channels)) if any((*shape.down(i), *shape.up(i)))), 0)
        tokens = (tile.height >> level) * (tile.width >> level)
        width = shape.head_dims[level] if shape.head_dims else 64
    else:
        tokens, width = tile.area // shape.patch**2, shape.head_dim
    query = AttentionSpec(device=device.type, dtype=dtype, head_dim=width, queries=tokens, keys=tokens, masked=False)
    try:
        return select(query, name).name
    except BackendRefused as refusal:
        raise BackendError(f"attention {name}: {refusal}" if name else str(refusal)) from None


@dataclass(frozen=True, slots=True)
class DispatchedAttention:
    """The attention processor of diffusers modules that sends every call through `kernels.dispatch`.

    `thin`: the factor per axis by which self-attention's keys and values are thinned, 1 for dense attention; a thinned layer
    attends to all it has. `cells`: latent cells per side of a token (2 at a UNet's second level, PixArt's patch).
    """

    backend: str | None = None
    """A backend's name; None lets the dispatch choose."""
    thin: int = 1
    """The factor per axis by which self-attention's keys and values are thinned, 1 for dense attention; a thinned layer
    attends to all it has.
    """
    cells: int = 1
    """Latent cells per side of a token: 2 at a UNet's second level, PixArt's patch."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        canvas: tuple[int, int] | None = None,
        policy: Policy = Global(),  # noqa: B008 - a frozen value
    ) -> Tensor:
        """hidden_states (B, N, C); encoder_hidden_states (B, M, D) for cross-attention; a mask is additive. temb is unused.

        canvas: rows and columns of latent cells, for thinning and for every policy but Global. policy: of self-attention,
        counted in latent cells.
        """
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        keys, values = attn.to_k(context), attn.to_v(context)
        grid = None if canvas is None else (-(-canvas[0] // self.cells), -(-canvas[1] // self.cells))
        mixing = policy.per(self.cells) if encoder_hidden_states is None and self.thin == 1 else Global()
        if self.thin > 1 and encoder_hidden_states is None:
            assert grid is not None, "thinning needs to know the grid of the tokens"
            keys, values = thinned(attn, keys, grid, self.thin), thinned(attn, values, grid, self.thin)
        q, k, v = heads(attn.to_q(hidden_states)), heads(keys), heads(values)
        mask = None if attention_mask is None else attention_mask.reshape(q.shape[0], -1, *attention_mask.shape[1:])
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        try:
            out = attention(q, k, v, canvas=grid, mask=mask, scale=attn.scale, policy=mixing, backend=self.backend)
        except BackendRefused as refusal:
            raise BackendError(str(refusal)) from None
        joined: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return joined


def dispatch_attention(unet: Any, backend: str | None = None) -> Any:
    """Send the attention of a diffusers UNet through the dispatch, each level with the cells of its tokens; returns it."""
    lowest = len(unet.config.block_out_channels) - 1

    def cells(name: str) -> int:
        """Latent cells per side of a token: down_blocks.1 is one level down, up_blocks.0 at the lowest, as is mid_block."""
        part, index, _ = name.split(".", 2)
        return int(2 ** (int(index) if part == "down_blocks" else lowest - int(index) if part == "up_blocks" else lowest))

    unet.set_attn_processor({name: DispatchedAttention(backend, cells=cells(name)) for name in unet.attn_processors})
    return unet


def thinned(attn: Any, tokens: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """R x R tokens become one, (B, h w, C) to (B, h/R w/R, C), as in PixArt-Σ's key-value compression (arXiv 2403.04692).

    By the block's own depth-wise convolution `sr` and layer norm `norm` where it has them, else by their mean. Where R does
    not divide the grid, its last row or column is repeated.
    """
    rows, cols = grid
    maps = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], rows, cols)
    if rows % factor or cols % factor:
        maps = F.pad(maps, (0, -cols % factor, 0, -rows % factor), mode="replicate")
    if not hasattr(attn, "sr"):
        return F.avg_pool2d(maps, factor).flatten(2).transpose(1, 2)
    normed: Tensor = attn.norm(attn.sr(maps).flatten(2).transpose(1, 2))
    return normed


def add_compression(transformer: Any, factors: Sequence[int], weights: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Give the blocks whose factor is above 1 the convolution and norm of key-value compression, named `attn1.sr`, `.norm`.

    weights: by block, 'sr.weight' (C, 1, R, R), 'sr.bias', 'norm.weight', 'norm.bias' (C), as the original files name them;
    a block without begins as the mean, normed, as in training.
    """
    for index, (block, factor) in enumerate(zip(transformer.transformer_blocks, factors, strict=True)):
        if factor == 1:
            continue
        attn, keys = block.attn1, block.attn1.to_k
        width, like = keys.out_features, {"device": keys.weight.device, "dtype": keys.weight.dtype}
        attn.sr = nn.Conv2d(width, width, factor, stride=factor, groups=width, **like)
        attn.norm = nn.LayerNorm(width, **like)
        nn.init.constant_(attn.sr.weight, 1 / factor**2)
        nn.init.zeros_(attn.sr.bias)
        given = weights.get(index, {})
        for name, module in (("sr", attn.sr), ("norm", attn.norm)) if given else ():
            module.load_state_dict({leaf: given[f"{name}.{leaf}"] for leaf in ("weight", "bias")})
        attn.sr.requires_grad_(False)
        attn.norm.requires_grad_(False)
