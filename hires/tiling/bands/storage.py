"""Where the exact autoencoder keeps its maps, and the rung of the ladder that fits a budget."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from hires.errors import BudgetError
from hires.kernels.attention_policies import EVERYWHERE, Policy, attended
from hires.tiling.bands.memory import SMALL, BandPeakTracker, VaeShape
from hires.tiling.geometry import Size
from hires.units import gib

DECODE_LIVE_MAPS = 3.0  # of the second level's channels at full resolution: 1536 B/px in bf16 at 256
CPU_SCRATCH = 2.0  # oneDNN keeps reordered copies of a convolution's input and output beside them
ENCODE_LIVE_MAPS = 5.0  # of the first level's channels at full resolution: 1280 B/px in bf16 at 128


def resnet_macs(c_in: int, c_out: int) -> int:
    """Multiply-accumulates per position of a resnet block: two 3x3 convolutions and the 1x1 shortcut."""
    return 9 * c_in * c_out + 9 * c_out * c_out + (c_in * c_out if c_in != c_out else 0)


def vae_decode_flops(shape: VaeShape, height_cells: int, width_cells: int) -> float:
    """Decoding one picture of the given latent size, attention of the mid block included where there is one."""
    positions = height_cells * width_cells
    c = shape.channels[-1]
    macs = 9 * shape.latent_channels * c * positions + 2 * resnet_macs(c, c) * positions
    if shape.mid_attention:
        macs += 4 * c * c * positions + 2 * c * positions * positions
    for i in reversed(range(len(shape.channels))):
        for _ in range(shape.resnets + 1):
            macs += resnet_macs(c, shape.channels[i]) * positions
            c = shape.channels[i]
        if i > 0:
            positions *= 4
            macs += 9 * c * c * positions
    return 2.0 * (macs + 9 * c * 3 * positions)


def vae_encode_flops(shape: VaeShape, height_cells: int, width_cells: int) -> float:
    """Encoding one picture whose latent size is given."""
    positions = height_cells * width_cells * int(4 ** (len(shape.channels) - 1))
    c = shape.channels[0]
    macs = 9 * 3 * c * positions
    for i, width in enumerate(shape.channels):
        for _ in range(shape.resnets):
            macs += resnet_macs(c, width) * positions
            c = width
        if i < len(shape.channels) - 1:
            positions //= 4
            macs += 9 * c * c * positions
    macs += 2 * resnet_macs(c, c) * positions + 9 * c * 2 * shape.latent_channels * positions
    if shape.mid_attention:
        macs += 4 * c * c * positions + 2 * c * positions * positions
    return 2.0 * macs


def vae_live_bytes(shape: VaeShape, pixels: int, element_bytes: int, cpu: bool, *, encode: bool = False) -> int:
    """Activations that live at once while `pixels` are decoded (or encoded) in one piece."""
    maps = (
        ENCODE_LIVE_MAPS * shape.channels[0] if encode else DECODE_LIVE_MAPS * shape.channels[min(1, len(shape.channels) - 1)]
    )
    picture = 3 * pixels * element_bytes if encode else 0
    return int(maps * pixels * element_bytes * (CPU_SCRATCH if cpu else 1.0)) + picture + SMALL


BAND_ROWS = (64, 32, 16, 8)
MOST_ELEMENTS = 2**31 - 1  # of one operator's input or output: larger ones overflow the index of some kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStorage:
    """One way to run an autoencoder: what is kept between layers, rows per band, bytes on the device and in host memory, and
    bytes that go between the two."""

    policy: str
    band_rows: int
    peak_bytes: int
    host_bytes: int
    flops: float
    attention: Policy = EVERYWHERE
    moved_bytes: int = 0

    def __str__(self) -> str:
        rows = "" if self.policy == "whole" else f", bands of {self.band_rows} rows"
        kind = "" if self.attention == EVERYWHERE else f", approximation: attention {self.attention} in cells of latents"
        return f"policy {self.policy}{rows}{kind}, predicted peak {gib(self.peak_bytes)}"


def indexable(shape: VaeShape, cells: Size, name: str, batch: int = 1, encode: bool = False) -> bool:
    """Whether every operator of a policy is handed at most `MOST_ELEMENTS`; in bands it always is."""
    scale = 2 ** (len(shape.channels) - 1)
    widest = shape.channels[0] if encode else shape.channels[min(1, len(shape.channels) - 1)]
    return name != "whole" or batch * cells.area * scale**2 * widest <= MOST_ELEMENTS


@functools.lru_cache(maxsize=4096)
def vae_policy(
    shape: VaeShape,
    cells: Size,
    element: int,
    name: str,
    band_rows: int,
    *,
    cpu: bool = False,
    encode: bool = False,
    attention: Policy = EVERYWHERE,
) -> BandStorage:
    """Bytes and FLOPs of one policy at latents of that many cells; `attention`: whom the mid block
    attends to."""
    pixels = cells.area * 4 ** (len(shape.channels) - 1)
    if name == "whole":
        flops = (vae_encode_flops if encode else vae_decode_flops)(shape, cells.height, cells.width)
        if shape.mid_attention:
            flops -= 4.0 * shape.channels[-1] * (cells.area**2 - attended(attention, (cells.height, cells.width)))
        peak = vae_live_bytes(shape, pixels, element, cpu, encode=encode)
        if shape.mid_attention:
            peak = max(peak, 8 * shape.channels[-1] * cells.area * element)
        return BandStorage(policy=name, band_rows=0, peak_bytes=peak, host_bytes=0, flops=flops, attention=attention)
    walk = BandPeakTracker(shape, name, band_rows, element, CPU_SCRATCH if cpu else 1.0, attention)
    (walk.encode if encode else walk.decode)(cells)
    return BandStorage(
        policy=name,
        band_rows=band_rows,
        peak_bytes=walk.device,
        host_bytes=walk.host,
        flops=2.0 * walk.macs,
        moved_bytes=int(walk.moved),
        attention=attention,
    )


HALO_LIVE_MAPS = 3  # of the widest channels at full resolution: a block's input, a convolution's input and its result
HALO_LIVE_CHANNELS = 8  # more, for the picture: as it came, moved to [0, 1], and cut


def halo_policy(
    *,
    rows: int,
    height: int,
    width: int,
    reach: int,
    cell_px: int,
    channels: int,
    macs_per_cell: float,
    element: int,
    cpu: bool,
) -> BandStorage:
    """Bands of `rows` cells, each computed with `reach` cells more on either side, of a picture of height x width cells."""
    count = -(-height // rows)
    tall = min(height, -(-height // count) + 2 * reach)
    computed = height + 2 * reach * (count - 1)
    live = (HALO_LIVE_MAPS * channels + HALO_LIVE_CHANNELS) * element * (CPU_SCRATCH if cpu else 1.0)
    peak = live * tall * width * cell_px**2
    flops = 2.0 * macs_per_cell * width * min(computed, count * height)
    return BandStorage(policy="halo", band_rows=rows * cell_px, peak_bytes=int(peak), host_bytes=0, flops=flops)


VAE_POLICIES = ("whole", "bands", "recompute_up", "recompute_conv", "host")


def vae_ladder(
    shape: VaeShape,
    cells: Size,
    element: int,
    budget: int | None,
    *,
    names: tuple[str, ...] = VAE_POLICIES,
    band_rows: int | None = None,
    cpu: bool = False,
    encode: bool = False,
    attention: Policy = EVERYWHERE,
    batch: int = 1,
) -> tuple[BandStorage, ...]:
    """The policies that fit a budget in bytes (weights not counted), fastest first; all that are named without one.

    BudgetError with the smallest budget that would do where none fits.
    """
    rows_to_try = (band_rows,) if band_rows else BAND_ROWS
    ways = [(name, rows_to_try[0]) for name in names] + [(names[-1], rows) for rows in rows_to_try[1:]]
    found = [vae_policy(shape, cells, element, *way, cpu=cpu, encode=encode, attention=attention) for way in ways]
    if batch > 1:
        scaled = ((batch * w.peak_bytes, batch * w.host_bytes, batch * w.flops) for w in found)
        found = [replace(w, peak_bytes=p, host_bytes=h, flops=f) for w, (p, h, f) in zip(found, scaled, strict=True)]
    found = [way for way in found if indexable(shape, cells, way.policy, batch, encode)] or found[:1]
    if budget is None:
        return tuple(found)
    fitting = tuple(p for p in found if p.peak_bytes <= budget)
    if not fitting:
        least = min(found, key=lambda p: p.peak_bytes)
        raise BudgetError(f"{least} is above the budget of {gib(budget)}: {gib(least.peak_bytes)} would do")
    return fitting
