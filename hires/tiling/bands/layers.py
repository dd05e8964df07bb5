"""Turns an autoencoder's module tree into a flat list of layers over rows.

Knows the structure of AutoencoderKL. The setting decides which maps are kept between layers; that never changes the values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hires.errors import RequestError, unknown
from hires.kernels.attention_policies import NPA, KVPool, Rows, Windowed, Windows, axis
from hires.kernels.dispatch import attention
from hires.kernels.reference import attention_streamed
from hires.kernels.torch_windows import attend_across, key_lines, pooled, query_lines
from hires.tiling.bands.memory import SCORES
from hires.tiling.bands.rows import Added, BandSetting, Convolved, Doubled, Halved, Kept, Normed, RowMap, finite_rows
from hires.tiling.bands.storage import VAE_POLICIES
from hires.tiling.bands.transfer import Arriving, Copier
from hires.tiling.retry import attempt, free_memory

log = logging.getLogger(__name__)


def band_setting(policy: str, band_rows: int, wrap: tuple[bool, bool], dtype: torch.dtype) -> BandSetting:
    """The setting of a storage policy. RequestError for an unknown policy.

    `bands` keeps every map; `recompute_up` all but the enlarged ones; `recompute_conv` neither those nor the first
    convolution of a resnet; `host` keeps every map in host memory.
    """
    if policy not in VAE_POLICIES[1:]:
        raise RequestError(unknown("VAE policy", policy, VAE_POLICIES))
    return BandSetting(
        band_rows=band_rows,
        wrap=wrap,
        dtype=dtype,
        host=policy == "host",
        keep_doubled=policy in ("bands", "host"),
        keep_first=policy != "recompute_conv",
    )


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the flat list."""

    kind: str
    """A case of `apply`."""
    module: Any
    """The module with the weights; for "head" a pair of norm and convolution."""


def decode_layers(vae: Any) -> list[Layer]:
    """The decoder from latents to pixels, top to bottom."""
    decoder, post = vae.decoder, getattr(vae, "post_quant_conv", None)
    layers = [Layer("conv", post)] if post is not None else []
    layers += [Layer("conv kept", decoder.conv_in), *_mid_layers(decoder.mid_block)]
    for block in _plain(decoder.up_blocks):
        layers += [Layer("resnet", resnet) for resnet in block.resnets]
        layers += [Layer("double", upsampler.conv) for upsampler in block.upsamplers or ()]
    return [*layers, Layer("head", (decoder.conv_norm_out, decoder.conv_out))]


def encode_layers(vae: Any) -> list[Layer]:
    """The encoder from pixels to the posterior's parameters (mean and log-variance channels)."""
    encoder, quant = vae.encoder, getattr(vae, "quant_conv", None)
    layers = [Layer("conv large", encoder.conv_in)]
    for block in _plain(encoder.down_blocks):
        layers += [Layer("resnet", resnet) for resnet in block.resnets]
        layers += [Layer("halve", downsampler.conv) for downsampler in block.downsamplers or ()]
    layers += [*_mid_layers(encoder.mid_block), Layer("head", (encoder.conv_norm_out, encoder.conv_out))]
    return [*layers, Layer("conv", quant)] if quant is not None else layers


def _plain(blocks: Any) -> Any:
    """The blocks themselves; RequestError if one holds more than resnets and a change of scale."""
    for block in blocks:
        if getattr(block, "attentions", None):
            raise RequestError(f"{type(block).__name__}: attention outside the mid block cannot run in bands; use policy whole")
    return blocks


def _mid_layers(block: Any) -> list[Layer]:
    layers = [Layer("resnet", block.resnets[0])]
    for attn, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        layers += [Layer("attention", attn)] if attn is not None else []
        layers += [Layer("resnet", resnet)]
    return layers


def apply(layer: Layer, x: RowMap, setting: BandSetting) -> RowMap:
    """The layer's map over `x`; a kept map is evaluated now, any other on demand."""
    match layer.kind:
        case "resnet":
            return _resnet(layer.module, x, setting)
        case "attention":
            return Kept(Attended(x, layer.module, setting), setting)
        case "halve":
            return Kept(Halved(x, layer.module, setting), setting)
        case "double":
            x = Convolved(Doubled(x), layer.module, setting)
            return Kept(x, setting) if setting.keep_doubled else x
        case "head":
            norm, conv = layer.module
            return Convolved(Normed(x, norm, setting), conv, setting)
    x = Convolved(x, layer.module, setting)
    return Kept(x, setting) if layer.kind == "conv kept" or (layer.kind == "conv large" and setting.keep_doubled) else x


def kept_bands(layers: list[Layer], height: int, setting: BandSetting, start: int = 0) -> int:
    """The number of bands to compute: of all kept maps, from `height` input rows on, and of the last map below `start`."""
    maps = {"resnet": 1 + setting.keep_first, "attention": 1, "halve": 1, "conv kept": 1}
    maps |= {"double": int(setting.keep_doubled), "conv large": int(setting.keep_doubled)}
    total = 0
    for layer in layers:
        height = 2 * height if layer.kind == "double" else height // 2 if layer.kind == "halve" else height
        total += maps.get(layer.kind, 0) * len(list(setting.bands(height)))
    return total + len(list(setting.bands(height - start)))


@dataclass
class Progress:
    """Where a smaller policy resumes after an out-of-memory: the last kept map that is still whole."""

    layers: int = 0
    """How many layers lie above the map, itself included."""
    map: Kept | None = None
    """The map; None at the start."""
    large: bool = False
    """Whether the smaller policies choose not to keep this map."""

    def resume(self, setting: BandSetting, given: RowMap) -> RowMap:
        """The map to resume from under a new setting; `given`, the input, if everything must start over.

        A large map that the new setting would not keep is dropped.
        """
        if self.map is None or not self.map.whole or (self.large and not setting.keep_doubled):
            self.layers, self.map = 0, None
            return given
        self.map.adopt(setting)
        return self.map

    def run(self, layers: list[Layer], x: RowMap, setting: BandSetting) -> RowMap:
        """Apply the remaining layers to `x`, the map of the last finished one."""
        for index in range(self.layers, len(layers)):
            x = apply(layers[index], x, setting)
            if isinstance(x, Kept):
                self.layers, self.map, self.large = index + 1, x, layers[index].kind in ("double", "conv large")
        return x


def _resnet(block: Any, x: RowMap, setting: BandSetting) -> Kept:
    """X + conv2(silu(norm2(conv1(silu(norm1(x)))))); the first convolution is kept or computed twice."""
    first: RowMap = Convolved(Normed(x, block.norm1, setting), block.conv1, setting)
    if setting.keep_first:
        first = Kept(first, setting, release_source=False)
    second = Convolved(Normed(first, block.norm2, setting), block.conv2, setting)
    shortcut = x if block.conv_shortcut is None else Convolved(x, block.conv_shortcut, setting)
    del first, x
    return Kept(Added(shortcut, second, block.output_scale_factor), setting)


class Attended(RowMap):
    """x + to_out(softmax(q k^T / sqrt(d)) v) over all tokens of the map.

    Keys and values are computed once, queries row by row. A `setting.attention` other than `Global` is an approximation: each
    block of queries sees only the keys of its window, or keys are pooled.
    """

    def __init__(self, source: RowMap, attn: Any, setting: BandSetting) -> None:
        self.source, self.attn, self.setting = source, attn, setting
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self.normed = Normed(source, attn.group_norm, setting, silu=False)
        self.copier = Copier(attn.to_q.weight.device) if setting.host else None
        bands = [self._keys_values(top, bottom) for top, bottom in self._key_bands()]
        self.dtype = torch.float32 if any(keys.dtype == torch.float32 for keys, _ in bands) else setting.dtype
        if setting.host:
            self.chunks = bands
        else:
            keys, values = (torch.cat(part, dim=2) for part in zip(*bands, strict=True))
            self.chunks = [(keys, values)]

    def _key_bands(self) -> Iterator[tuple[int, int]]:
        """Bands for keys; all but the last are multiples of the pooling factor."""
        policy, rows = self.setting.attention, self.setting.band_rows
        if not isinstance(policy, KVPool):
            return self.setting.bands(self.height)
        step = max(1, rows // policy.r) * policy.r
        return ((top, min(top + step, self.height)) for top in range(0, self.height, step))

    def _tokens(self, top: int, bottom: int) -> Tensor:
        return finite_rows(self.normed, self.setting, top, bottom).flatten(2).transpose(1, 2)  # (B, N, C)

    def _project(self, linear: nn.Linear, tokens: Tensor) -> Tensor:
        dtype = tokens.dtype
        out = F.linear(tokens, linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype))
        return out.reshape(*out.shape[:2], int(self.attn.heads), -1).transpose(1, 2)  # (B, heads, N, d)

    def _keys_values(self, top: int, bottom: int) -> tuple[Tensor, Tensor]:
        tokens = self._tokens(top, bottom)
        pair = self._project(self.attn.to_k, tokens), self._project(self.attn.to_v, tokens)
        if tokens.dtype == torch.float16 and not all(bool(torch.isfinite(part).all()) for part in pair):
            self.setting.recomputed += 1
            pair = self._project(self.attn.to_k, tokens.float()), self._project(self.attn.to_v, tokens.float())
        if isinstance(self.setting.attention, KVPool):
            canvas = bottom - top, self.width
            pair = pooled(pair[0], canvas, self.setting.attention.r), pooled(pair[1], canvas, self.setting.attention.r)
        return pair if self.copier is None else (self.copier.park(pair[0]), self.copier.park(pair[1]))

    def _tokens_of(self, first: int, last: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of rows first to last - 1, on the module's device."""
        parts: list[tuple[Tensor, Tensor]] = []
        top = 0
        for keys, values in self.chunks:
            bottom = top + keys.shape[2] // self.width
            if top < last and first < bottom:
                part = slice((max(first, top) - top) * self.width, (min(last, bottom) - top) * self.width)
                parts.append((keys[:, :, part], values[:, :, part]))
            top = bottom
        if self.copier is not None:
            keys, values = (self.copier.fetch(part, dtype).take() for part in zip(*parts, strict=True))
        else:
            keys, values = (torch.cat([t.to(dtype) for t in part], dim=2) for part in zip(*parts, strict=True))
        return keys, values

    def _windowed(self, queries: Tensor, top: int, policy: Windowed) -> Tensor:
        """Attention of each block over its window of keys; the result does not depend on the bands."""
        rows, cols = axis(policy, self.height, 0), axis(policy, self.width, 1)
        lines = self._as_rows(queries)
        out = torch.empty_like(lines)
        for index in range(rows.count):
            inside = [line - top for line in query_lines(rows, index) if top <= line < top + lines.shape[2]]
            if inside:
                keys, values = self._around(key_lines(rows, index), queries.dtype)
                out[:, :, inside] = attend_across(lines[:, :, inside], keys, values, None, cols, self._mix)
        return out.flatten(2, 3)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attention(q, k, v, mask=mask, scale=self.attn.scale, backend=self.setting.backend)

    def _as_rows(self, tokens: Tensor) -> Tensor:
        """(B, heads, n w, d) to (B, heads, n, w, d)."""
        return tokens.reshape(*tokens.shape[:2], -1, self.width, tokens.shape[-1])

    def _around(self, lines: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, rows, w, d) of consecutive rows, which may wrap around the edge."""
        first, count = lines[0], len(lines)
        spans = [(first, min(first + count, self.height))]
        spans += [(0, first + count - self.height)] if first + count > self.height else []
        parts = [self._tokens_of(*span, dtype) for span in spans]
        keys, values = (torch.cat(part, dim=2) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        return self._as_rows(keys), self._as_rows(values)

    def _arriving(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Chunks of keys and values from host memory; each is fetched while the previous one is being used.

        Chunks are as long as the limit on scores, `memory.SCORES`, allows.
        """
        at_once = max(1, SCORES // queries.shape[:-1].numel())
        ahead: tuple[Arriving, Arriving] | None = None
        for keys, values in self.chunks:
            for start in range(0, keys.shape[2], at_once):
                part = slice(start, start + at_once)
                now, ahead = ahead, self._fetched(keys[:, :, part], values[:, :, part], queries.dtype)
                if now is not None:
                    yield now[0].take(), now[1].take()
        if ahead is not None:
            yield ahead[0].take(), ahead[1].take()

    def _fetched(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Arriving, Arriving]:
        assert self.copier is not None, "keys come from host memory"
        return self.copier.fetch([keys], dtype), self.copier.fetch([values], dtype)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        queries = self._project(self.attn.to_q, self._tokens(top, bottom))
        queries = queries.to(torch.promote_types(queries.dtype, self.dtype))  # keys that overflowed are float32
        policy = self.setting.attention
        if isinstance(policy, NPA | Windows | Rows):
            mixed = self._windowed(queries, top, policy)
        elif self.setting.host:
            mixed = attention_streamed(queries, self._arriving(queries), self.attn.scale)
        else:
            mixed = self._mix(queries, *(part.to(queries.dtype) for part in self.chunks[0]))
        out: nn.Linear = self.attn.to_out[0]
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), out.weight.to(mixed.dtype), out.bias.to(mixed.dtype))
        rows: Tensor = mixed.transpose(1, 2).reshape(mixed.shape[0], self.channels, bottom - top, self.width)
        if self.attn.residual_connection:
            rows = rows + self.source.read(top, bottom)
        return rows / float(self.attn.rescale_output_factor)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row)


LEAST_ROWS = 8  # the shortest band to try after an out-of-memory


def last_rows(picture: RowMap, setting: BandSetting, start: int = 0) -> Iterator[Tensor]:
    """Yield the rows of the last map from `start` on, freeing the rows above them. NotFiniteError for NaN or infinity.

    All earlier maps are finished by now, so an out-of-memory first halves the bands, down to `LEAST_ROWS`, before it is raised.
    """
    top, rows = start, setting.band_rows
    while top < picture.height:
        count = -(-(picture.height - top) // rows)
        bottom = top + -(-(picture.height - top) // count)
        if rows > LEAST_ROWS:
            band, message = attempt(lambda span: finite_rows(picture, setting, *span, last=True), (top, bottom))
            if band is None:
                free_memory()
                rows = max(LEAST_ROWS, (bottom - top) // 2)
                setting.halved += 1
                log.warning(
                    "out of memory with the last map's rows %d to %d (%s); bands of %d rows", top, bottom, message, rows
                )
                continue
        else:
            band = finite_rows(picture, setting, top, bottom, last=True)
        picture.release(bottom)
        setting.on_band()
        yield band
        del band
        top = bottom
