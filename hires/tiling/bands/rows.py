"""Feature maps that are read row by row: stored in bands, or computed on demand.

Between two norms everything in a convolutional autoencoder is local, so a chain of maps can be evaluated for any rows. A
`Kept` map in between is computed once and freed from the top as its reader moves down. The storage policies differ only in
which maps are kept: the values are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hires.kernels.attention_policies import EVERYWHERE, Policy
from hires.kernels.group_norm import group_norm_apply
from hires.tiling.bands import finite
from hires.tiling.bands.norm import affine, moments
from hires.tiling.bands.transfer import Arriving, Copier
from hires.tiling.geometry import bands

log = logging.getLogger(__name__)
WRAPPED_HOLD = 8  # first rows to keep for the last ones when the map wraps around; no chain reaches further


class RowMap:
    """A map (B, channels, height, width) whose rows can be read."""

    channels: int
    height: int
    width: int
    reach: int = 0
    """How many rows beyond its own a row needs of the kept maps below it."""

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1, 0 <= top < bottom <= height: (B, channels, bottom - top, width)."""
        raise NotImplementedError

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""


@dataclass
class BandSetting:
    """How maps are evaluated, and counters of what happened on the way."""

    band_rows: int
    """Rows per band."""
    wrap: tuple[bool, bool] = (False, False)
    """Whether rows, columns wrap around."""
    dtype: torch.dtype = torch.float32
    """The dtype that layers compute in."""
    host: bool = False
    """Store kept maps in host memory."""
    keep_doubled: bool = True
    """Keep the large maps: after each enlargement, and the encoder's first."""
    keep_first: bool = True
    """Keep the first convolution of each resnet instead of computing it twice."""
    on_band: Callable[[], None] = lambda: None
    """Called after each band of a kept map; may raise to cancel."""
    attention: Policy = EVERYWHERE
    """Which tokens the mid block attends to; all of them for the exact result."""
    backend: str | None = None
    """The attention backend that must run; None chooses one."""
    recomputed: int = 0
    """Counts bands that overflowed in half precision and were computed again."""
    halved: int = 0
    """Counts how often the last map's bands were halved after an out-of-memory."""

    def bands(self, height: int) -> Iterator[tuple[int, int]]:
        """The bands (top, bottom) of a map of that height."""
        return bands(height, self.band_rows)


class Given(RowMap):
    """The input of the first layer, read by a function: latents, or a picture larger than memory."""

    def __init__(self, channels: int, height: int, width: int, read: Callable[[int, int], Tensor]) -> None:
        self.channels, self.height, self.width, self._read = channels, height, width, read

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        return self._read(top, bottom)


class Kept(RowMap):
    """A map stored in bands, on the device or, with `setting.host`, in host memory. Freed from the top.

    If the reader moves down in even steps, its next rows are fetched from host memory while it works on the current ones.
    """

    def __init__(self, source: RowMap, setting: BandSetting, *, release_source: bool = True) -> None:
        self.setting = setting
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self._bounds = list(setting.bands(self.height))
        self._bands: list[Tensor | None] = []
        self._copier: Copier | None = None
        self._before, self._ahead_of = (0, 0), (0, 0)
        self._ahead: Arriving | None = None
        for top, bottom in self._bounds:
            band = finite_rows(source, setting, top, bottom)
            self._device = band.device
            self._bands.append(self._parked(band) if setting.host else band)
            del band
            if release_source:
                source.release(bottom)
            setting.on_band()

    def _parked(self, band: Tensor) -> Tensor:
        if self._copier is None:
            self._copier = Copier(self._device)
        return self._copier.park(band, torch.channels_last)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        if self._copier is None:
            moved = [part.to(self.setting.dtype) for part in self._parts(top, bottom)]
            return moved[0] if len(moved) == 1 else torch.cat(moved, dim=2)
        if self._ahead is None or self._ahead_of != (top, bottom):
            self._ahead = None  # freed before the next fetch
            self._ahead = self._copier.fetch(self._parts(top, bottom), self.setting.dtype)
        rows = self._ahead.take()
        self._look_ahead(top, bottom)
        return rows

    def _look_ahead(self, top: int, bottom: int) -> None:
        """Fetch the next rows if the last two reads were one step apart."""
        assert self._copier is not None
        before, self._before, self._ahead = self._before, (top, bottom), None
        step = top - before[0]
        if step > 0 and bottom - before[1] == step and bottom < self.height > top + step:
            self._ahead_of = following = (top + step, min(self.height, bottom + step))
            self._ahead = self._copier.fetch(self._parts(*following), self.setting.dtype)

    def _parts(self, top: int, bottom: int) -> list[Tensor]:
        parts = []
        for band, (first, last) in zip(self._bands, self._bounds, strict=True):
            if first < bottom and top < last:
                assert band is not None, f"rows {top} to {bottom} were released"
                parts.append(band[..., max(top, first) - first : min(bottom, last) - first, :])
        return parts

    @property
    def whole(self) -> bool:
        """Whether no row has been released yet."""
        return all(band is not None for band in self._bands)

    def adopt(self, setting: BandSetting) -> None:
        """Continue under another setting: bands keep their cuts, and move to host memory if the setting says so."""
        self.setting, self._ahead = setting, None
        if setting.host and self._copier is None:
            for index, band in enumerate(self._bands):
                self._bands[index] = None if band is None else self._parked(band)
                del band

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        hold = WRAPPED_HOLD if self.setting.wrap[0] else 0
        for index, (top, bottom) in enumerate(self._bounds):
            if bottom <= row and top >= hold:
                self._bands[index] = None


def finite_rows(source: RowMap, setting: BandSetting, top: int, bottom: int, *, last: bool = False) -> Tensor:
    """Rows of a map, computed again in float32, and counted, if half precision overflowed.

    last: whether this is the output map, which is checked in every precision; NotFiniteError if float32 does not help. NaN
    and infinity of earlier maps reach it through the norms.
    """
    rows, dtype = source.read(top, bottom), setting.dtype
    if not (last or dtype == torch.float16) or finite.all_finite(rows):
        return rows
    if dtype in finite.LOWER:
        setting.dtype = torch.float32
        try:
            rows = source.read(top, bottom)
        finally:
            setting.dtype = dtype
        setting.recomputed += 1
        log.warning("rows %d to %d overflowed in half precision and were computed again in float32", top, bottom)
    if last:
        finite.check_finite(rows, f"rows {top} to {bottom}")
    return finite.lowered(rows, dtype)


class Normed(RowMap):
    """GroupNorm with the statistics of the whole map, then SiLU. Reads its source once for the statistics."""

    def __init__(self, source: RowMap, norm: nn.GroupNorm, setting: BandSetting, *, silu: bool = True) -> None:
        self.source, self.setting, self.silu, self.reach = source, setting, silu, source.reach
        self.channels, self.height, self.width = source.channels, source.height, source.width
        rows = (finite_rows(source, setting, top, bottom) for top, bottom in setting.bands(source.height))
        self.scale, self.shift = affine(norm, moments(rows, norm.num_groups))

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        dtype = self.setting.dtype
        return group_norm_apply(self.source.read(top, bottom), self.scale, self.shift, silu=self.silu, dtype=dtype)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row)


class Convolved(RowMap):
    """A convolution of stride 1 with odd kernel and 'same' padding, zero or wrapped around."""

    def __init__(self, source: RowMap, conv: nn.Conv2d, setting: BandSetting) -> None:
        self.source, self.conv, self.setting = source, conv, setting
        self.halo = conv.kernel_size[0] // 2
        self.reach = source.reach + self.halo
        self.channels, self.height, self.width = conv.out_channels, source.height, source.width

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        rows = with_halo(self.source, top - self.halo, bottom + self.halo, self.setting.wrap[0])
        pad = self.conv.kernel_size[1] // 2
        if pad and self.setting.wrap[1]:
            rows, pad = F.pad(rows, (pad, pad, 0, 0), mode="circular"), 0
        return F.conv2d(rows, *weights_of(self.conv, self.setting.dtype), padding=(0, pad))

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row - self.halo)


class Halved(RowMap):
    """The encoder's downsampling: a 3x3 convolution of stride 2, padded by one row below and one column at the right."""

    def __init__(self, source: RowMap, conv: nn.Conv2d, setting: BandSetting) -> None:
        self.source, self.conv, self.setting = source, conv, setting
        self.reach = (source.reach + 2) // 2 + 1
        self.channels, self.height, self.width = conv.out_channels, source.height // 2, source.width // 2

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        rows = with_halo(self.source, 2 * top, 2 * bottom + 1, self.setting.wrap[0])
        side = (0, 1, 0, 0)
        rows = F.pad(rows, side, mode="circular") if self.setting.wrap[1] else F.pad(rows, side)
        return F.conv2d(rows, *weights_of(self.conv, self.setting.dtype), stride=2)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(2 * row)


class Doubled(RowMap):
    """Nearest-neighbour enlargement by two."""

    def __init__(self, source: RowMap) -> None:
        self.source, self.reach = source, 2 * source.reach
        self.channels, self.height, self.width = source.channels, 2 * source.height, 2 * source.width

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        first = top // 2
        rows = F.interpolate(self.source.read(first, -(-bottom // 2)), scale_factor=2.0, mode="nearest")
        return rows[..., top - 2 * first : bottom - 2 * first, :]

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row // 2)


class Added(RowMap):
    """The sum of two maps, divided by `divisor`."""

    def __init__(self, left: RowMap, right: RowMap, divisor: float = 1.0) -> None:
        self.left, self.right, self.divisor = left, right, divisor
        self.reach = max(left.reach, right.reach)
        self.channels, self.height, self.width = left.channels, left.height, left.width

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows top to bottom - 1: (B, channels, bottom - top, width)."""
        total = self.left.read(top, bottom) + self.right.read(top, bottom)
        return total if self.divisor == 1.0 else total / self.divisor

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        for part in (self.left, self.right):  # both may read one kept map: the longer reach decides
            part.release(row - (self.reach - part.reach))


def with_halo(source: RowMap, top: int, bottom: int, wrap: bool) -> Tensor:
    """Rows top to bottom - 1 of a map; rows outside it are zero, or wrapped around."""
    height = source.height
    above, below = max(0, -top), max(0, bottom - height)
    rows = source.read(max(0, top), min(bottom, height))
    if not above and not below:
        return rows
    if not wrap:
        return F.pad(rows, (0, 0, above, below))
    parts = [source.read(height - above, height)] if above else []
    parts.append(rows)
    if below:
        parts.append(source.read(0, below))
    return torch.cat(parts, dim=2)


def weights_of(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a convolution in a dtype."""
    return conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)


def join(bands: Sequence[Tensor]) -> Tensor:
    """Bands (B, C, rows, W) as one map."""
    return bands[0] if len(bands) == 1 else torch.cat(list(bands), dim=2)
