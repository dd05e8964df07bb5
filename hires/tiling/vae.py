"""An autoencoder in bands with the pixels of the whole: `TiledVAE(vae).decode(z)` equals `vae.decode(z)` to rounding.

Every layer runs over all rows before the next one starts. Convolutions read one neighbour row, GroupNorm statistics are
merged over bands, the mid block attends to all tokens in chunks. Storage policies, from fast to small, decide which maps are
kept between layers; they never change the values. Knows the structure of AutoencoderKL, no model by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hires.errors import RequestError, unknown
from hires.kernels.dispatch import attention
from hires.kernels.reference import attention_streamed
from hires.tiling.geometry import Box, Size
from hires.tiling.rows import (
    Added,
    Convolved,
    Doubled,
    Given,
    Halved,
    Kept,
    Normed,
    RowMap,
    Setting,
    finite_rows,
    join,
    to_host,
    weights_of,
)
from hires.types import VAE_POLICIES

OnBand = Callable[[int, int], None]


class PixelSource(Protocol):
    """A picture that is read box by box, values in [-1, 1]."""

    @property
    def size(self) -> Size: ...

    def crop(self, part: Box) -> Tensor:
        """Pixels (B, 3, part.height, part.width)."""
        ...


@dataclass(frozen=True, slots=True)
class WholePicture:
    """A tensor (B, 3, H, W) as a source."""

    pixels: Tensor

    @property
    def size(self) -> Size:
        return Size(self.pixels.shape[-2], self.pixels.shape[-1])

    def crop(self, part: Box) -> Tensor:
        return self.pixels[..., part.rows, part.cols]


def setting_of(policy: str, band_rows: int, wrap: tuple[bool, bool], dtype: torch.dtype) -> Setting:
    """What a policy keeps: `bands` every map, `recompute_up` not what a stage enlarges, `recompute_conv` nor the first
    convolution of a resnet, `host` everything, in host memory."""
    if policy not in VAE_POLICIES[1:]:
        raise RequestError(unknown("VAE policy", policy, VAE_POLICIES))
    return Setting(
        band_rows=band_rows,
        wrap=wrap,
        dtype=dtype,
        host=policy == "host",
        keep_doubled=policy in ("bands", "host"),
        keep_first=policy != "recompute_conv",
    )


def decode_rows(vae: nn.Module, z: Tensor, setting: Setting) -> RowMap:
    """The decoded picture as a map that is read from top to bottom; `z` as `vae.decode` takes it."""
    decoder: Any = vae.decoder
    x: RowMap = _given(z, setting, vae)
    if getattr(vae, "post_quant_conv", None) is not None:
        x = Convolved(x, vae.post_quant_conv, setting)  # type: ignore[arg-type]
    x = _mid_block(decoder.mid_block, Kept(Convolved(x, decoder.conv_in, setting), setting), setting)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, setting)
        for upsampler in block.upsamplers or ():
            x = Convolved(Doubled(x), upsampler.conv, setting)
            x = Kept(x, setting) if setting.keep_doubled else x
    return Convolved(Normed(x, decoder.conv_norm_out, setting), decoder.conv_out, setting)


def encode_rows(vae: nn.Module, source: RowMap, setting: Setting) -> RowMap:
    """The posterior's parameters (mean and log-variance channels) of a picture as a map."""
    encoder: Any = vae.encoder
    x: RowMap = Convolved(source, encoder.conv_in, setting)
    x = Kept(x, setting) if setting.keep_doubled else x
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, setting)
        for downsampler in block.downsamplers or ():
            x = Kept(Halved(x, downsampler.conv, setting), setting)
    x = _mid_block(encoder.mid_block, x, setting)
    x = Convolved(Normed(x, encoder.conv_norm_out, setting), encoder.conv_out, setting)
    if getattr(vae, "quant_conv", None) is not None:
        x = Convolved(x, vae.quant_conv, setting)  # type: ignore[arg-type]
    return x


def _given(tensor: Tensor, setting: Setting, vae: nn.Module) -> Given:
    device = next(vae.parameters()).device

    def read(top: int, bottom: int) -> Tensor:
        return tensor[..., top:bottom, :].to(device, setting.dtype)

    return Given(tensor.shape[1], tensor.shape[2], tensor.shape[3], read)


def _resnet(block: Any, x: RowMap, setting: Setting) -> Kept:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), the first convolution kept or computed twice."""
    first: RowMap = Convolved(Normed(x, block.norm1, setting), block.conv1, setting)
    if setting.keep_first:
        first = Kept(first, setting, release_source=False)
    second = Convolved(Normed(first, block.norm2, setting), block.conv2, setting)
    shortcut = x if block.conv_shortcut is None else Convolved(x, block.conv_shortcut, setting)
    del first, x
    return Kept(Added(shortcut, second, block.output_scale_factor), setting)


def _mid_block(block: Any, x: RowMap, setting: Setting) -> RowMap:
    x = _resnet(block.resnets[0], x, setting)
    for attn, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attn is not None:
            x = Kept(Attended(x, attn, setting), setting)
        x = _resnet(resnet, x, setting)
    return x


class Attended(RowMap):
    """x + to_out(softmax(q k^T / sqrt(d)) v) over all tokens of the map; keys and values are made once, queries by rows."""

    def __init__(self, source: RowMap, attn: Any, setting: Setting) -> None:
        self.source, self.attn, self.setting = source, attn, setting
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self.normed = Normed(source, attn.group_norm, setting, silu=False)
        bands = [self._keys_values(top, bottom) for top, bottom in setting.bands(source.height)]
        if setting.host:
            self.chunks = bands
        else:
            keys, values = (torch.cat(part, dim=2) for part in zip(*bands, strict=True))
            self.chunks = [(keys, values)]

    def _tokens(self, top: int, bottom: int) -> Tensor:
        return self.normed.read(top, bottom).flatten(2).transpose(1, 2)  # (B, N, C)

    def _project(self, linear: nn.Linear, tokens: Tensor) -> Tensor:
        dtype = tokens.dtype
        out = F.linear(tokens, linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))
        return out.unflatten(2, (self.attn.heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    def _keys_values(self, top: int, bottom: int) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(top, bottom)
        pair = self._project(self.attn.to_k, tokens), self._project(self.attn.to_v, tokens)
        return (to_host(pair[0]), to_host(pair[1])) if self.setting.host else pair

    def read(self, top: int, bottom: int) -> Tensor:
        queries = self._project(self.attn.to_q, self._tokens(top, bottom))
        if len(self.chunks) == 1:
            keys, values = (t.to(queries) for t in self.chunks[0])
            mixed = attention(queries, keys, values, scale=self.attn.scale)
        else:
            pairs = ((k.to(queries, non_blocking=True), v.to(queries, non_blocking=True)) for k, v in self.chunks)
            mixed = attention_streamed(queries, pairs, self.attn.scale)
        out: nn.Linear = self.attn.to_out[0]
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), out.weight.to(mixed.dtype), out.bias.to(mixed.dtype))
        rows = mixed.transpose(1, 2).unflatten(2, (bottom - top, self.width))
        if self.attn.residual_connection:
            rows = rows + self.source.read(top, bottom)
        return rows if self.attn.rescale_output_factor == 1 else rows / self.attn.rescale_output_factor

    def release(self, row: int) -> None:
        self.source.release(row)
