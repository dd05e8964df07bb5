"""Predicts peak bytes and FLOPs of an autoencoder in bands.

Walks the same maps as `tiling.bands.rows`, with sizes in place of tensors: `KeptCost` stands for `Kept` there, and so on. A
cost knows what reading rows of its map holds, what stays, and what is freed. Imports no torch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field

from hires.kernels.attention_policies import Policy, attended
from hires.tiling.geometry import Size, bands


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeShape:
    """The structure of an AutoencoderKL, as far as its cost depends on it."""

    channels: tuple[int, ...]
    """Channels per level, full resolution first."""
    resnets: int
    """Resnets per level of the encoder; the decoder has one more."""
    latent_channels: int
    """Channels of the latents."""
    mid_attention: bool
    """Whether the mid block has attention."""


SCORES = 2**24  # float32 attention scores held at once while keys stream from the host
CHUNK = 1024  # keys per chunk of the chunked attention
HOST_READS = 2.5  # how often a map in host memory is fetched: for its norm, its convolution and, every second map, the sum
SMALL = 2**20  # statistics, scales and shifts of the norms, and other small tensors


def pinned_bytes(size: int) -> int:
    """What torch's pinned-memory allocator takes for a block: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True, slots=True)
class ReadCost:
    """The cost of reading some rows of a map."""

    peak: int
    """Bytes at the worst moment."""
    held: int
    """Bytes of the result; 0 for a view."""
    macs: float = 0.0
    """Multiply-accumulates."""


@dataclass
class MapCost:
    """The cost of a map that is read by rows."""

    channels: int
    height: int
    width: int
    element: int
    """Bytes per value."""
    reach: int = 0
    """How many rows beyond its own a row needs of the kept maps below it."""

    def bytes(self, rows: int) -> int:
        """Bytes of that many rows."""
        return self.channels * min(rows, self.height) * self.width * self.element

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading `rows` rows anywhere or, if `aligned`, exactly one stored band."""
        raise NotImplementedError

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""


@dataclass
class GivenCost(MapCost):
    """The input: a view of latents, or a copy of part of a picture."""

    copied: bool = False
    """Whether reading copies the rows."""

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        size = self.bytes(rows) if self.copied else 0
        return ReadCost(size, size)


@dataclass
class KeptCost(MapCost):
    """A map stored in bands."""

    bounds: list[int] = field(default_factory=list)
    """The bottom row of each band."""
    host: bool = False
    """Whether it is stored in host memory."""
    ahead: int = 0
    """Bytes being fetched from host memory in advance."""
    stored_bytes: int = 0
    """Bytes of the bands that are stored and not yet freed."""
    _sizes: tuple[int, ...] = field(default=(), init=False)
    """Bytes of each band where it is stored."""
    _stored: int = field(default=0, init=False)
    """Bands stored so far."""
    _freed: int = field(default=0, init=False)
    """Bands freed from the top."""

    def __post_init__(self) -> None:
        heights = [bottom - top for top, bottom in itertools.pairwise([0, *self.bounds])]
        size = {rows: pinned_bytes(self.bytes(rows)) if self.host else self.bytes(rows) for rows in set(heights)}
        self._sizes = tuple(size[rows] for rows in heights)

    def store(self) -> None:
        """Store the next band."""
        self.stored_bytes += self._sizes[self._stored]
        self._stored += 1

    def store_all(self) -> None:
        """Store every band that is not stored yet."""
        self.stored_bytes += sum(self._sizes[self._stored :])
        self._stored = len(self._sizes)

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        size = self.bytes(rows)
        if self.host and len(self.bounds) > 2:  # the third read is the first to be predicted
            self.ahead = max(self.ahead, size)
        if aligned or len(self.bounds) == 1:
            return ReadCost(size, size) if self.host else ReadCost(0, 0)
        return ReadCost(2 * size if self.host else size, size)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        while self._freed < len(self.bounds) and self.bounds[self._freed] <= row:
            self.stored_bytes -= self._sizes[self._freed]
            self._freed += 1


@dataclass
class NormedCost(MapCost):
    """GroupNorm and the activation after it."""

    source: MapCost = field(kw_only=True)

    def __post_init__(self) -> None:
        self.reach = self.source.reach

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        below, size = self.source.read(rows, aligned), self.bytes(rows)
        inner = size // self.element * max(4, self.element)  # float32 while it is normalised
        last = inner + size if self.element < 4 else inner
        return ReadCost(max(below.peak, below.held + inner, last), size, below.macs)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row)


@dataclass
class ConvolvedCost(MapCost):
    """A convolution of stride 1."""

    source: MapCost = field(kw_only=True)
    kernel: int = 3

    def __post_init__(self) -> None:
        self.reach = self.source.reach + self.kernel // 2

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        rows, halo = min(rows, self.height), self.kernel // 2
        below = self.source.read(rows + 2 * halo, aligned and not halo)
        result = self.bytes(rows)
        macs = below.macs + float(rows * self.width) * self.source.channels * self.channels * self.kernel**2
        if not halo:
            return ReadCost(max(below.peak, below.held + result), result, macs)
        row = self.source.bytes(1)
        padded = (rows + 2) * row  # at the top and the bottom zeros are added to a copy
        edge = self.source.read(rows + 1).held if rows < self.height else self.source.read(rows).held
        return ReadCost(max(below.peak, edge + padded, padded + result), result, macs)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row - self.kernel // 2)


@dataclass
class HalvedCost(MapCost):
    """The encoder's downsampling convolution."""

    source: MapCost = field(kw_only=True)

    def __post_init__(self) -> None:
        self.reach = (self.source.reach + 2) // 2 + 1

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        rows = min(rows, self.height)
        below, result = self.source.read(2 * rows + 1), self.bytes(rows)
        row = self.source.bytes(1)
        padded = (2 * rows + 1) * (row + row // self.source.width)
        both = (2 * rows + 1) * row + padded  # at the bottom a row of zeros is added first
        macs = below.macs + 9.0 * rows * self.width * self.source.channels * self.channels
        return ReadCost(max(below.peak, below.held + padded, both, padded + result), result, macs)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(2 * row)


@dataclass
class DoubledCost(MapCost):
    """Nearest-neighbour enlargement by two."""

    source: MapCost = field(kw_only=True)

    def __post_init__(self) -> None:
        self.reach = 2 * self.source.reach

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        half = min(-(-min(rows, self.height) // 2) + 1, self.source.height)
        below, result = self.source.read(half), self.bytes(2 * half)
        return ReadCost(max(below.peak, below.held + result), result, below.macs)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        self.source.release(row // 2)


@dataclass
class AddedCost(MapCost):
    """The sum of two maps."""

    left: MapCost = field(kw_only=True)
    right: MapCost = field(kw_only=True)

    def __post_init__(self) -> None:
        self.reach = max(self.left.reach, self.right.reach)

    def read(self, rows: int, aligned: bool = False) -> ReadCost:
        """The cost of reading rows of this map."""
        left, right, size = self.left.read(rows, aligned), self.right.read(rows, aligned), self.bytes(rows)
        peak = max(left.peak, left.held + right.peak, left.held + right.held + size)
        return ReadCost(peak, size, left.macs + right.macs)

    def release(self, row: int) -> None:
        """Promise that no row above `row` is read again."""
        for part in (self.left, self.right):
            part.release(row - (self.reach - part.reach))


class BandPeakTracker:
    """Runs an autoencoder's layers on sizes and tracks the peaks.

    Args:
        shape: the autoencoder.
        name: the storage policy, all but "whole".
        band_rows: rows per band.
        element: bytes per value.
        scratch: factor on the bytes being computed; on a CPU convolutions keep copies of their own.
        policy: which tokens the mid block attends to.

    After `decode` or `encode`: `device` and `host` are the peak bytes there, `macs` the multiply-accumulates, `moved` the
    bytes copied to host memory and back.
    """

    def __init__(self, shape: VaeShape, name: str, band_rows: int, element: int, scratch: float, policy: Policy) -> None:
        self.shape, self.band_rows, self.element, self.scratch, self.policy = shape, band_rows, element, scratch, policy
        self.on_host = name == "host"
        self.keep_doubled, self.keep_first = name in ("bands", "host"), name != "recompute_conv"
        self.live: list[KeptCost] = []
        self._bands: dict[int, tuple[tuple[int, int], ...]] = {}
        self._heights: dict[int, Counter[int]] = {}
        self.device, self.host, self.macs, self.moved = SMALL, 0, 0.0, 0.0

    def decode(self, cells: Size) -> None:
        """Walk the decoder for latents of that size."""
        shape, c = self.shape, self.shape.channels[-1]
        x: MapCost = GivenCost(shape.latent_channels, cells.height, cells.width, self.element)
        x = self.mid(self.keep(self.conv(self.conv(x, shape.latent_channels, kernel=1), c)))
        for level in reversed(range(len(shape.channels))):
            for _ in range(shape.resnets + 1):
                x = self.resnet(x, shape.channels[level])
            if level:
                doubled = DoubledCost(x.channels, 2 * x.height, 2 * x.width, self.element, source=x)
                x = self.conv(doubled, x.channels)
                x = self.keep(x) if self.keep_doubled else x
        self.last(self.conv(self.norm(x), 3))

    def encode(self, cells: Size) -> None:
        """Walk the encoder for latents of that size."""
        shape, scale = self.shape, 2 ** (len(self.shape.channels) - 1)
        source = GivenCost(3, cells.height * scale, cells.width * scale, self.element, copied=True)
        x: MapCost = self.conv(source, shape.channels[0])
        x = self.keep(x) if self.keep_doubled else x
        for level, width in enumerate(shape.channels):
            for _ in range(shape.resnets):
                x = self.resnet(x, width)
            if level < len(shape.channels) - 1:
                x = self.keep(HalvedCost(width, x.height // 2, x.width // 2, self.element, source=x))
        x = self.conv(self.norm(self.mid(x)), 2 * shape.latent_channels)
        self.last(self.conv(x, 2 * shape.latent_channels, kernel=1))

    def mid(self, x: MapCost) -> MapCost:
        """The mid block."""
        x = self.resnet(x, x.channels)
        if self.shape.mid_attention:
            x = self.attention(x)
        return self.resnet(x, x.channels)

    def conv(self, x: MapCost, channels: int, kernel: int = 3) -> ConvolvedCost:
        """A convolution with that many output channels."""
        return ConvolvedCost(channels, x.height, x.width, self.element, source=x, kernel=kernel)

    def norm(self, x: MapCost) -> NormedCost:
        """GroupNorm; its statistics are computed now, band by band, in float32."""
        for rows, count in self.heights(x).items():  # nothing is stored or freed on the way
            read = x.read(rows, aligned=True)
            cast = x.bytes(rows) // self.element * 4 if self.element < 4 else 0
            self.macs += count * read.macs
            self.moment(max(read.peak, read.held + cast))
        return NormedCost(x.channels, x.height, x.width, self.element, source=x)

    def resnet(self, x: MapCost, channels: int) -> MapCost:
        """A resnet block."""
        first: MapCost = self.conv(self.norm(x), channels)
        if self.keep_first:
            first = self.keep(first, release=False)
        second = self.conv(self.norm(first), channels)
        shortcut = x if x.channels == channels else self.conv(x, channels, kernel=1)
        return self.keep(AddedCost(channels, x.height, x.width, self.element, left=shortcut, right=second))

    def attention(self, x: MapCost) -> MapCost:
        """The attention block: keys and values of all tokens, then queries band by band."""
        rows = max(self.heights(x))
        read, out = self.norm(x).read(rows, aligned=True), self.stored(x)
        c, area, whole = x.channels, x.height * x.width, x.bytes(x.height)
        tokens, inner = rows * x.width, max(4, self.element)
        self.macs += 4.0 * c * c * area + 2.0 * c * attended(self.policy, (x.height, x.width))
        band = tokens * c * self.element
        if self.on_host:
            at_once = min(area, max(1, SCORES // tokens))
            pairs = 1 if at_once == area else 2  # the next keys and values arrive while these are in use
            arriving = at_once * c * (2 * pairs * self.element + inner)
            working = inner * tokens * at_once + tokens * c * (3 * inner + self.element) + arriving
            self.host = max(self.host, 3 * whole + 2 * band)
        else:
            self.moment(4 * whole)  # the bands' keys and values beside their union
            chunked = tokens * min(area, CHUNK) * 3 * inner + tokens * c * (3 * inner + self.element)
            working = 2 * whole + max(chunked, 4 * band)
        self.moment(max(read.peak + 2 * band, working, read.peak + (0 if self.on_host else 2 * whole)))
        self.live = [out]
        out.store_all()
        return out

    def stored(self, x: MapCost) -> KeptCost:
        """A kept map of the same size, still empty."""
        bounds = [bottom for _, bottom in self.bands(x.height)]
        return KeptCost(x.channels, x.height, x.width, self.element, bounds=bounds, host=self.on_host)

    def keep(self, x: MapCost, release: bool = True) -> KeptCost:
        """Store a map band by band; with `release`, free its sources on the way."""
        out = self.stored(x)
        self.live.append(out)
        self.moved += (1 + HOST_READS) * x.bytes(x.height) if self.on_host else 0
        if not release:
            self.keep_beside(out, x)
            return out
        reads = {rows: x.read(rows, aligned=True) for rows in self.heights(x)}
        for top, bottom in self.bands(x.height):
            read = reads[bottom - top]
            self.macs += read.macs
            if self.on_host:  # its bands count there once they are stored, and not on the device
                out.store()
                self.moment(max(read.peak, read.held))
            else:
                self.moment(max(read.peak, read.held))  # the band itself is in it: storing it adds nothing
                out.store()
            x.release(bottom)
        self.live = [out]
        return out

    def keep_beside(self, out: KeptCost, x: MapCost) -> None:
        """Store a map whose sources stay: what is stored only grows, so the last band of each height is its peak."""
        for rows, times in self.heights(x).items():  # from top to bottom; only the last may be lower
            read = x.read(rows, aligned=True)
            self.macs += times * read.macs
            for _ in range(times - 1):
                out.store()
            self.moment(max(read.peak, read.held))
            out.store()
        if self.on_host:
            self.moment(0)

    def last(self, x: MapCost) -> None:
        """Read the output rows band by band."""
        reads = {rows: x.read(rows, aligned=True) for rows in self.heights(x)}
        for top, bottom in self.bands(x.height):
            read = reads[bottom - top]
            self.macs += read.macs
            self.moment(max(read.peak, read.held))
            x.release(bottom)

    def bands(self, height: int) -> tuple[tuple[int, int], ...]:
        """Top and bottom row of each band of a map; the same for every map of that height."""
        if height not in self._bands:
            self._bands[height] = tuple(bands(height, self.band_rows))
        return self._bands[height]

    def heights(self, x: MapCost) -> Counter[int]:
        """How many bands have each height."""
        if x.height not in self._heights:
            self._heights[x.height] = Counter(bottom - top for top, bottom in self.bands(x.height))
        return self._heights[x.height]

    def moment(self, working: int) -> None:
        """Record a moment at which `working` bytes are being computed beside the stored maps."""
        stored, arriving, computed = 0, 0, int(working * self.scratch) + SMALL
        for kept in self.live:
            stored += kept.stored_bytes
            arriving += kept.ahead
        if self.on_host:
            self.host, self.device = max(self.host, stored), max(self.device, computed + arriving)
        else:
            self.device = max(self.device, stored + computed)
