"""Runs an autoencoder without norms and attention (such as TAESD) in exact bands.

Everything in an AutoencoderTiny is local, so a band of the picture depends only on its band of latents and on `reach` rows
beside it. A band computed with that many more rows and then cropped equals that band of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hires.errors import BudgetError, RequestError
from hires.kernels.attention_policies import EVERYWHERE, Policy
from hires.kernels.single_precision import in_single
from hires.tiling.bands import finite
from hires.tiling.bands.rows import join
from hires.tiling.bands.storage import MOST_ELEMENTS, BandStorage, HaloShape, halo_policy
from hires.tiling.geometry import Box, Size
from hires.tiling.retry import Ladder
from hires.tiling.vae import OnBand, PixelSource, TiledVAE, VaeRun, WholePicture, is_circular
from hires.units import gib

log = logging.getLogger(__name__)
BAND_PX = (1024, 512, 256, 128, 64, 32, 16, 8)


def reach(layers: nn.Module) -> int:
    """How many input rows beyond its own an output row depends on. RequestError for an unknown layer."""
    rows = 0
    for layer in reversed(list(layers.children())):
        if isinstance(layer, nn.Conv2d):
            rows = rows * layer.stride[0] + layer.kernel_size[0] // 2
        elif isinstance(layer, nn.Upsample):
            rows = -(-rows // _factor(layer))
        elif isinstance(getattr(layer, "conv", None), nn.Sequential):  # a residual block; its shortcut reaches less
            rows += reach(layer.conv)  # type: ignore[arg-type]
        elif list(layer.parameters()):
            raise RequestError(f"an AutoencoderTiny has no layer {type(layer).__name__}: use TiledVAE")
    return rows


def weights_times_positions(layers: nn.Module, scale: float = 1.0) -> float:
    """Multiply-accumulates per input position, of which the first layer has `scale` positions each."""
    total = 0.0
    for layer in layers.children():
        if isinstance(layer, nn.Conv2d):
            scale /= layer.stride[0] ** 2
            total += layer.weight.numel() * scale
        elif isinstance(layer, nn.Upsample):
            scale *= _factor(layer) ** 2
        else:
            for part in (getattr(layer, "conv", None), getattr(layer, "skip", None)):
                if isinstance(part, nn.Module):
                    total += weights_times_positions(part if isinstance(part, nn.Sequential) else nn.Sequential(part), scale)
    return total


def _factor(layer: nn.Upsample) -> int:
    factor: Any = layer.scale_factor
    return int(factor)


class HaloVAE:
    """Runs an AutoencoderTiny in bands, with the pixels of the whole.

    Args:
        vae: a diffusers AutoencoderTiny; runs in its own dtype on its own device.
        budget_bytes: what it may hold on the device beyond its weights; the tallest bands that fit are used.
        band_px: rows of the picture per band instead, rounded up to whole cells.
        wrap: whether rows, columns wrap around (seamless textures); by default if the module's convolutions are circular.

    After an out-of-memory the bands are halved; finished rows stay. RequestError for a module with norms or attention,
    BudgetError if no band fits, MemoryLadderError if the smallest one runs out of memory, NotFiniteError if the module gives
    NaN or infinity even in float32.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        budget_bytes: int | None = None,
        band_px: int | None = None,
        wrap: tuple[bool, bool] | None = None,
    ) -> None:
        if band_px is not None and band_px < 1:
            raise RequestError(f"band_px={band_px}: give at least 1 row")
        module: Any = vae
        circular = is_circular(vae)
        self.wrap = (circular, circular) if wrap is None else wrap
        if circular and not all(self.wrap):
            raise RequestError(f"wrap={wrap}: the module's convolutions are circular on both axes; leave wrap out")
        self.vae, self.budget_bytes, self.band_px = vae, budget_bytes, band_px
        levels = len(module.config.decoder_block_out_channels)
        self.cell_px = int(module.config.upsampling_scaling_factor) ** (levels - 1)  # the module's own figure is always 8
        self.decode_reach = reach(module.decoder.layers)  # cells
        self.encode_reach = -(-reach(module.encoder.layers) // self.cell_px)  # cells, so that strides stay aligned
        self.widest = max(module.config.decoder_block_out_channels)
        first = next(vae.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.last: VaeRun | None = None

    def plan(self, h: int, w: int, *, batch: int = 1, encode: bool = False) -> tuple[BandStorage, ...]:
        """The bands for latents of h x w cells, tallest first, with their bytes and FLOPs, halo rows included."""
        layers: nn.Module = (self.vae.encoder if encode else self.vae.decoder).layers  # type: ignore[union-attr,assignment]
        positions = self.cell_px**2 if encode else 1
        cells = tuple(dict.fromkeys(-(-rows // self.cell_px) for rows in BAND_PX))
        if self.band_px is not None:
            first = -(-self.band_px // self.cell_px)
            cells = (first, *(rows for rows in cells if rows < first))
        shape = HaloShape(
            reach=self.encode_reach if encode else self.decode_reach,
            cell_px=self.cell_px,
            channels=self.widest,
            macs_per_cell=weights_times_positions(layers) * positions,
        )
        element, cpu = self.dtype.itemsize * batch, self.device.type == "cpu"
        ways = [
            halo_policy(shape, Size(h, w), min(rows, h), element=element, cpu=cpu)
            for rows in ((h, *cells) if self.band_px is None else cells)
        ]
        ways = list(dict.fromkeys(ways))
        fitting = [way for way in ways if self.budget_bytes is None or way.peak_bytes <= self.budget_bytes]
        if not fitting:
            raise BudgetError(
                f"{ways[-1]} is above the budget of {gib(self.budget_bytes or 0)}: {gib(ways[-1].peak_bytes)} would do"
            )
        width_px = w * self.cell_px
        indexable = [way for way in fitting if batch * way.band_rows * width_px * self.widest <= MOST_ELEMENTS]
        return tuple(indexable or fitting[-1:])

    def decode(self, z: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) of latents (B, C, h, w)."""
        return join(list(self.decode_bands(z)))

    @torch.no_grad()
    def decode_bands(self, z: Tensor, on_band: OnBand | None = None) -> Iterator[Tensor]:
        """Yield finished rows (B, 3, rows, W) from top to bottom; `on_band(done, total)` may raise to cancel."""

        def read(rows: list[int], cols: list[int]) -> Tensor:
            return z[:, :, rows][..., cols].to(self.device, self.dtype)

        def network(part: Tensor) -> Tensor:
            return self.vae.decode(part, return_dict=False)[0]  # type: ignore[operator,no-any-return]

        cells = Size(z.shape[2], z.shape[3])
        ladder = Ladder(self.plan(cells.height, cells.width, batch=z.shape[0]), str)
        task = _HaloTask(read=read, network=network, cells=cells, halo=self.decode_reach, scale=self.cell_px)
        yield from self._bands(task, ladder, on_band)

    @torch.no_grad()
    def encode(self, x: Tensor | PixelSource, on_band: OnBand | None = None) -> Tensor:
        """Latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1], or of a picture read box by box, in whole cells."""
        source = WholePicture(x) if isinstance(x, Tensor) else x
        cells = source.size.divided(self.cell_px)
        cell = self.cell_px

        def read(rows: list[int], cols: list[int]) -> Tensor:
            strips = [source.crop(Box(top * cell, 0, (bottom - top) * cell, cells.width * cell)) for top, bottom in runs(rows)]
            picture = join(strips)
            if cols != list(range(cells.width)):
                picture = torch.cat([picture[..., left * cell : right * cell] for left, right in runs(cols)], dim=3)
            return picture.to(self.device, self.dtype)

        def network(part: Tensor) -> Tensor:
            return self.vae.encode(part, return_dict=False)[0]  # type: ignore[operator,no-any-return]

        batch = x.shape[0] if isinstance(x, Tensor) else 1
        ladder = Ladder(self.plan(cells.height, cells.width, batch=batch, encode=True), str)
        task = _HaloTask(read=read, network=network, cells=cells, halo=self.encode_reach, scale=1)
        return join(list(self._bands(task, ladder, on_band)))

    def _bands(self, task: _HaloTask, ladder: Ladder[BandStorage], on_band: OnBand | None) -> Iterator[Tensor]:
        """Yield bands of whole cells, each computed with its halo and then cropped."""
        height, width, halo, scale = task.cells.height, task.cells.width, task.halo, task.scale
        side = halo if self.wrap[1] else 0
        cols = [col % width for col in range(-side, width + side)]
        top = 0
        while top < height:

            def band(rung: BandStorage, top: int = top) -> Tensor:
                rows = rung.band_rows // self.cell_px
                bottom = top + -(-(height - top) // -(-(height - top) // rows))
                first, last = (top - halo, bottom + halo) if self.wrap[0] else (max(0, top - halo), min(height, bottom + halo))
                part = task.read([row % height for row in range(first, last)], cols)
                out = self._finite(task.network, part, f"rows {top * scale} to {bottom * scale}")
                return out[:, :, (top - first) * scale : (bottom - first) * scale, side * scale : (side + width) * scale]

            rows = ladder.run(band)
            top += rows.shape[2] // scale
            if on_band is not None:
                on_band(top, height)
            yield rows
        self.last = VaeRun(policy=ladder.rung.policy, taken=ladder.taken)

    def _finite(self, network: Callable[[Tensor], Tensor], part: Tensor, where: str) -> Tensor:
        """The network's output for a part, computed again in float32 if half precision overflows. May raise NotFiniteError."""
        out = network(part)
        if finite.all_finite(out):
            return out
        if self.dtype not in finite.LOWER:
            return finite.check_finite(out, where)
        log.warning("%s overflowed in half precision and are computed again in float32", where)
        with in_single(self.vae):
            out = finite.check_finite(network(part.float()), where)
        return finite.lowered(out, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _HaloTask:
    """One decode or encode in bands."""

    read: Callable[[list[int], list[int]], Tensor]
    """The input at rows and columns of cells."""
    network: Callable[[Tensor], Tensor]
    """The decoder or the encoder."""
    cells: Size
    """The size of the latents."""
    halo: int
    """Cells computed beyond each band."""
    scale: int
    """Rows of the output per cell."""


def tiled_autoencoder(
    vae: nn.Module,
    *,
    budget_bytes: int | None = None,
    policy: str | None = None,
    band_px: int | None = None,
    attention: Policy = EVERYWHERE,
    attention_window: int | None = None,
) -> TiledVAE | HaloVAE:
    """A `TiledVAE`, or a `HaloVAE` for a module without norms and attention.

    RequestError if a policy or an attention is given for the latter, which has neither.
    """
    if not hasattr(vae, "spatial_scale_factor"):
        options: dict[str, Any] = {"attention": attention, "attention_window": attention_window}
        return TiledVAE(vae, budget_bytes=budget_bytes, policy=policy, band_px=band_px, **options)
    if policy is not None or attention_window is not None or attention != EVERYWHERE:
        refused = f"policy {policy!r}" if policy is not None else f"attention {attention_window or attention}"
        raise RequestError(f"{refused}: {type(vae).__name__} has no norms and no attention to choose for; leave it out")
    return HaloVAE(vae, budget_bytes=budget_bytes, band_px=band_px)


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as half-open runs: 7, 8, 0, 1 gives (7, 9), (0, 2)."""
    start = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield numbers[start], numbers[index - 1] + 1
            start = index
