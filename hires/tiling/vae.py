"""An autoencoder in bands with the pixels of the whole: `TiledVAE(vae).decode(z)` equals `vae.decode(z)` to rounding.

Every layer runs over all rows before the next one starts. Convolutions read one neighbour row, GroupNorm statistics are
merged over bands, the mid block attends to all tokens in chunks. Storage policies, from fast to small, decide which maps are
kept between layers; they never change the values. Knows the structure of AutoencoderKL, no model by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hires.cost import VaePolicy, vae_ladder
from hires.errors import MemoryLadderError, RequestError, unknown
from hires.kernels.dispatch import attention
from hires.kernels.reference import attention_streamed
from hires.specs import VaeShape
from hires.tiling.geometry import Box, Size
from hires.tiling.retry import attempt, free_memory
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
)
from hires.types import VAE_POLICIES

log = logging.getLogger(__name__)
OnBand = Callable[[int, int], None]
SCORES = 2**24  # attention scores at once where keys stream from the host; float32, three copies live


class Rung(Protocol):
    """One way to run: a policy and its rows per band."""

    @property
    def policy(self) -> str: ...

    @property
    def band_rows(self) -> int: ...


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
        return out.reshape(*out.shape[:2], int(self.attn.heads), -1).transpose(1, 2)  # (B, heads, N, d)

    def _keys_values(self, top: int, bottom: int) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(top, bottom)
        pair = self._project(self.attn.to_k, tokens), self._project(self.attn.to_v, tokens)
        return (to_host(pair[0]), to_host(pair[1])) if self.setting.host else pair

    def _arriving(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values from host memory, so many at a time that their scores stay below `SCORES`."""
        at_once = max(1, SCORES // queries.shape[:-1].numel())
        for keys, values in self.chunks:
            for start in range(0, keys.shape[2], at_once):
                part = slice(start, start + at_once)
                yield keys[:, :, part].to(queries, non_blocking=True), values[:, :, part].to(queries, non_blocking=True)

    def read(self, top: int, bottom: int) -> Tensor:
        queries = self._project(self.attn.to_q, self._tokens(top, bottom))
        if self.setting.host:
            mixed = attention_streamed(queries, self._arriving(queries), self.attn.scale)
        else:
            mixed = attention(queries, *self.chunks[0], scale=self.attn.scale)
        out: nn.Linear = self.attn.to_out[0]
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), out.weight.to(mixed.dtype), out.bias.to(mixed.dtype))
        rows: Tensor = mixed.transpose(1, 2).reshape(mixed.shape[0], self.channels, bottom - top, self.width)
        if self.attn.residual_connection:
            rows = rows + self.source.read(top, bottom)
        return rows / float(self.attn.rescale_output_factor)

    def release(self, row: int) -> None:
        self.source.release(row)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeRun:
    """What happened: the policy that finished and how many before it ran out of memory."""

    policy: str
    taken: int = 0


class TiledVAE:
    """Any AutoencoderKL with the memory of a few bands. Usable beside any diffusers pipeline.

    Args:
        vae: a diffusers AutoencoderKL; its dtype and device are used as they are.
        budget_bytes: what it may hold on the device beyond its weights; the fastest policy that fits is taken.
        policy: one of `VAE_POLICIES` instead; `band_px` rows of each map at a time (default 64).
        wrap: rows, columns wrap around (seamless textures); by default where the module's convolutions are circular.

    After an out-of-memory the next smaller policy starts over; rows that have left stay as they are. RequestError for an
    unknown policy, BudgetError where no policy fits, MemoryLadderError where the smallest one runs out of memory.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        budget_bytes: int | None = None,
        policy: str | None = None,
        band_px: int | None = None,
        wrap: tuple[bool, bool] | None = None,
    ) -> None:
        if policy is not None and policy not in VAE_POLICIES:
            raise RequestError(unknown("VAE policy", policy, VAE_POLICIES))
        if band_px is not None and band_px < 1:
            raise RequestError(f"band_px={band_px}: give a number of rows from 1")
        config: Any = vae.config
        self.vae, self.budget_bytes, self.policy, self.band_px = vae, budget_bytes, policy, band_px
        self.cell_px = 2 ** (len(config.block_out_channels) - 1)
        circular = any(isinstance(m, nn.Conv2d) and m.padding_mode == "circular" for m in vae.modules())
        self.wrap = (circular, circular) if wrap is None else wrap
        self.shape = VaeShape(
            channels=tuple(config.block_out_channels),
            resnets=config.layers_per_block,
            latent_channels=config.latent_channels,
            mid_attention=getattr(config, "mid_block_add_attention", True),
        )
        self.last: VaeRun | None = None

    def plan(self, h: int, w: int, *, encode: bool = False) -> tuple[VaePolicy, ...]:
        """The policies for latents of h x w cells from the one that runs first to the last that is tried, with their bytes."""
        first = next(self.vae.parameters())
        if self.policy is not None:
            at = VAE_POLICIES.index(self.policy)
            names, budget = VAE_POLICIES[at:], None
        else:  # on a CPU, host memory is the same memory
            names = VAE_POLICIES[:-1] if first.device.type == "cpu" else VAE_POLICIES
            budget = self.budget_bytes
        return vae_ladder(
            self.shape,
            Size(h, w),
            first.element_size(),
            budget,
            names=names,
            band_rows=self.band_px,
            cpu=first.device.type == "cpu",
            encode=encode,
        )

    def decode(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of latents (B, C, h, w) as `vae.decode` takes them."""
        return join(list(self.decode_bands(z)))

    def decode_bands(self, z: Tensor, on_band: OnBand | None = None) -> Iterator[Tensor]:
        """Finished rows (B, 3, rows, W) from top to bottom, in the module's dtype and on its device."""
        height = z.shape[2] * self.cell_px
        ladder, taken, done = self.plan(z.shape[2], z.shape[3]), 0, 0
        while done < height:
            rung, message = ladder[taken], ""
            bands = run_decode(self.vae, z, rung, self.wrap, on_band)
            top = 0
            while top < height:
                band, message = attempt(next, bands)
                if band is None:
                    break
                bottom = top + band.shape[2]
                if bottom > done:
                    yield band[:, :, max(0, done - top) :]
                    done = bottom
                top = bottom
            if message:
                del bands
                taken = _next_rung(ladder, taken, message)
        self.last = VaeRun(policy=ladder[taken].policy, taken=taken)

    def encode(self, x: Tensor | PixelSource, on_band: OnBand | None = None) -> Tensor:
        """The posterior's mean (B, C, h, w), unscaled, of pixels (B, 3, H, W) in [-1, 1] or of a picture read box by box."""
        source = WholePicture(x) if isinstance(x, Tensor) else x
        ladder, taken = self.plan(source.size.height // self.cell_px, source.size.width // self.cell_px, encode=True), 0
        while True:
            rung = ladder[taken]
            mean, message = attempt(lambda rung: run_encode(self.vae, source, rung, self.wrap, on_band), rung)
            if mean is not None:
                self.last = VaeRun(policy=rung.policy, taken=taken)
                return mean
            taken = _next_rung(ladder, taken, message)


def _next_rung(ladder: tuple[VaePolicy, ...], taken: int, message: str) -> int:
    free_memory()
    failed = ladder[taken]
    if taken + 1 == len(ladder):
        raise MemoryLadderError(f"out of memory with {failed} ({message}): give a smaller picture or more memory")
    log.warning("out of memory with %s (%s); going on with %s", failed, message, ladder[taken + 1])
    return taken + 1


def run_decode(
    vae: nn.Module, z: Tensor, rung: Rung, wrap: tuple[bool, bool] = (False, False), on_band: OnBand | None = None
) -> Iterator[Tensor]:
    """Decoded rows by one policy; `whole` is the module itself. `on_band(done, total)` may raise to cancel."""
    first = next(vae.parameters())
    if rung.policy == "whole" and not any(wrap):
        yield vae.decode(z.to(first.device, first.dtype), return_dict=False)[0]  # type: ignore[operator]
        _report(on_band, 1, 1)
        return
    setting = _setting_for(rung, z.shape[2], wrap, first.dtype)
    setting.on_band = Counter(on_band, decode_passes(vae, Size(z.shape[2], z.shape[3]), setting)).count
    picture = decode_rows(vae, z, setting)
    for top, bottom in setting.bands(picture.height):
        rows = finite_rows(picture, setting, top, bottom)
        picture.release(bottom)
        setting.on_band()
        yield rows


def run_encode(
    vae: nn.Module, source: PixelSource, rung: Rung, wrap: tuple[bool, bool] = (False, False), on_band: OnBand | None = None
) -> Tensor:
    """The posterior's mean by one policy."""
    first, size = next(vae.parameters()), source.size
    whole = Box(0, 0, size.height, size.width)
    if rung.policy == "whole" and not any(wrap):
        mean: Tensor = vae.encode(source.crop(whole).to(first.device, first.dtype)).latent_dist.mean  # type: ignore[operator]
        _report(on_band, 1, 1)
        return mean
    setting = _setting_for(rung, size.height, wrap, first.dtype)
    setting.on_band = Counter(on_band, encode_passes(vae, size, setting)).count

    def read(top: int, bottom: int) -> Tensor:
        return source.crop(Box(top, 0, bottom - top, size.width)).to(first.device, setting.dtype)

    latents = encode_rows(vae, Given(3, size.height, size.width, read), setting)
    bands = [latents.read(top, bottom).chunk(2, dim=1)[0] for top, bottom in setting.bands(latents.height)]
    return join(bands)


def _setting_for(rung: Rung, height: int, wrap: tuple[bool, bool], dtype: torch.dtype) -> Setting:
    """A rung's setting; the module itself knows no wrap-around, so there `whole` is one band of each map."""
    if rung.policy == "whole":
        return setting_of("bands", 64 * height, wrap, dtype)
    return setting_of(rung.policy, rung.band_rows, wrap, dtype)


@dataclass
class Counter:
    """Counts the bands of all kept maps towards a total."""

    on_band: OnBand | None
    total: int
    done: int = 0

    def count(self) -> None:
        self.done += 1
        _report(self.on_band, min(self.done, self.total), self.total)


def _report(on_band: OnBand | None, done: int, total: int) -> None:
    if on_band is not None:
        on_band(done, total)


def decode_passes(vae: Any, cells: Size, setting: Setting) -> int:
    """How many bands a decode computes: those of every kept map and of the picture."""
    first = 2 if setting.keep_first else 1
    height, mid = cells.height, vae.decoder.mid_block
    total = (1 + first * len(mid.resnets) + sum(a is not None for a in mid.attentions)) * len(list(setting.bands(height)))
    for block in vae.decoder.up_blocks:
        total += first * len(block.resnets) * len(list(setting.bands(height)))
        for _ in block.upsamplers or ():
            height *= 2
            total += len(list(setting.bands(height))) if setting.keep_doubled else 0
    return total + len(list(setting.bands(height)))


def encode_passes(vae: Any, size: Size, setting: Setting) -> int:
    """How many bands an encode computes: those of every kept map."""
    first = 2 if setting.keep_first else 1
    height, mid = size.height, vae.encoder.mid_block
    total = len(list(setting.bands(height))) if setting.keep_doubled else 0
    for block in vae.encoder.down_blocks:
        total += first * len(block.resnets) * len(list(setting.bands(height)))
        for _ in block.downsamplers or ():
            height //= 2
            total += len(list(setting.bands(height)))
    return total + (first * len(mid.resnets) + sum(a is not None for a in mid.attentions)) * len(list(setting.bands(height)))
