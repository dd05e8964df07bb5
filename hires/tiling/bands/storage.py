"""Storage policies of the exact autoencoder and the choice that fits a budget."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from hires.errors import BudgetError
from hires.kernels.attention_policies import EVERYWHERE, Policy, attended
from hires.tiling.bands.memory import SMALL, BandPeakTracker, VaeShape
from hires.tiling.geometry import Size
from hires.units import gib

DECODE_LIVE_MAPS = 3.0  # maps of the second level's channels at full resolution: 1536 B/px in bf16 at 256
CPU_SCRATCH = 2.0  # oneDNN keeps reordered copies of a convolution's input and output
ENCODE_LIVE_MAPS = 5.0  # maps of the first level's channels at full resolution: 1280 B/px in bf16 at 128


def resnet_macs(c_in: int, c_out: int) -> int:
    """Multiply-accumulates per position of a resnet block: two 3x3 convolutions and the 1x1 shortcut."""
    return 9 * c_in * c_out + 9 * c_out * c_out + (c_in * c_out if c_in != c_out else 0)


def vae_decode_flops(shape: VaeShape, height_cells: int, width_cells: int) -> float:
    """FLOPs of decoding one picture of the given latent size, mid-block attention included."""
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
    """FLOPs of encoding one picture of the given latent size."""
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
    """Bytes of the activations alive at once while `pixels` pixels are decoded, or encoded, in one piece."""
    maps = (
        ENCODE_LIVE_MAPS * shape.channels[0] if encode else DECODE_LIVE_MAPS * shape.channels[min(1, len(shape.channels) - 1)]
    )
    picture = 3 * pixels * element_bytes if encode else 0
    return int(maps * pixels * element_bytes * (CPU_SCRATCH if cpu else 1.0)) + picture + SMALL


VAE_POLICIES = ("whole", "bands", "recompute_up", "recompute_conv", "host")
BAND_ROWS = (64, 32, 16, 8)
MOST_ELEMENTS = 2**31 - 1  # of one operator's input or output: more overflow the 32-bit index of some kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStorage:
    """One way to run an autoencoder, with its predicted cost."""

    policy: str
    """What is kept between layers, one of `VAE_POLICIES`; "halo" for an autoencoder without norms."""
    band_rows: int
    """Rows per band; 0 for "whole"."""
    peak_bytes: int
    """Peak bytes on the device, weights not counted."""
    host_bytes: int
    """Peak bytes in host memory."""
    flops: float
    """FLOPs of the whole run."""
    attention: Policy = EVERYWHERE
    """Which tokens the mid block attends to."""
    moved_bytes: int = 0
    """Bytes copied between the device and host memory."""

    def __str__(self) -> str:
        rows = "" if self.policy == "whole" else f", bands of {self.band_rows} rows"
        kind = "" if self.attention == EVERYWHERE else f", approximation: attention {self.attention} in cells of latents"
        return f"policy {self.policy}{rows}{kind}, predicted peak {gib(self.peak_bytes)}"


def indexable(shape: VaeShape, cells: Size, name: str, batch: int = 1, encode: bool = False) -> bool:
    """Whether no operator of a policy gets more than `MOST_ELEMENTS` values; in bands that is always so."""
    scale = 2 ** (len(shape.channels) - 1)
    widest = shape.channels[0] if encode else shape.channels[min(1, len(shape.channels) - 1)]
    return name != "whole" or batch * cells.area * scale**2 * widest <= MOST_ELEMENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeTask:
    """What an autoencoder is to do, as far as its cost depends on it."""

    shape: VaeShape
    """The autoencoder."""
    cells: Size
    """The size of the latents."""
    element: int
    """Bytes per value."""
    batch: int = 1
    """Pictures at once."""
    cpu: bool = False
    """Whether it runs on a CPU."""
    encode: bool = False
    """Whether it encodes, else it decodes."""
    attention: Policy = EVERYWHERE
    """Which tokens the mid block attends to."""


@functools.lru_cache(maxsize=4096)
def vae_policy(task: VaeTask, name: str, band_rows: int) -> BandStorage:
    """One storage policy, of `VAE_POLICIES`, with its predicted bytes and FLOPs for one picture, whatever the batch."""
    shape, cells, element, cpu, encode = task.shape, task.cells, task.element, task.cpu, task.encode
    attention = task.attention
    pixels = cells.area * 4 ** (len(shape.channels) - 1)
    if name == "whole":
        flops = (vae_encode_flops if encode else vae_decode_flops)(shape, cells.height, cells.width)
        if shape.mid_attention:
            flops -= 4.0 * shape.channels[-1] * (cells.area**2 - attended(attention, (cells.height, cells.width)))
        peak = vae_live_bytes(shape, pixels, element, cpu, encode=encode)
        if shape.mid_attention:
            peak = max(peak, 8 * shape.channels[-1] * cells.area * element)
        return BandStorage(policy=name, band_rows=0, peak_bytes=peak, host_bytes=0, flops=flops, attention=attention)
    tracker = BandPeakTracker(shape, name, band_rows, element, CPU_SCRATCH if cpu else 1.0, attention)
    (tracker.encode if encode else tracker.decode)(cells)
    return BandStorage(
        policy=name,
        band_rows=band_rows,
        peak_bytes=tracker.device,
        host_bytes=tracker.host,
        flops=2.0 * tracker.macs,
        moved_bytes=int(tracker.moved),
        attention=attention,
    )


HALO_LIVE_MAPS = 3  # maps of the widest channels at full resolution: a block's input, a convolution's input and its result
HALO_LIVE_CHANNELS = 8  # more channels for the picture: as given, scaled to [0, 1], and cropped


@dataclass(frozen=True, slots=True, kw_only=True)
class HaloShape:
    """An autoencoder without norms and attention, as far as its cost depends on it."""

    reach: int
    """Rows of cells that a row depends on beyond its own."""
    cell_px: int
    """Pixels per cell side."""
    channels: int
    """Channels of the widest layer."""
    macs_per_cell: float
    """Multiply-accumulates per cell."""


def halo_policy(shape: HaloShape, cells: Size, rows: int, *, element: int, cpu: bool) -> BandStorage:
    """The cost of bands of `rows` cells, each computed with `reach` more cells on either side; element: bytes per value."""
    reach, cell_px, macs_per_cell = shape.reach, shape.cell_px, shape.macs_per_cell
    height, width = cells.height, cells.width
    count = -(-height // rows)
    tall = min(height, -(-height // count) + 2 * reach)
    computed = height + 2 * reach * (count - 1)
    live = (HALO_LIVE_MAPS * shape.channels + HALO_LIVE_CHANNELS) * element * (CPU_SCRATCH if cpu else 1.0)
    peak = live * tall * width * cell_px**2
    flops = 2.0 * macs_per_cell * width * min(computed, count * height)
    return BandStorage(policy="halo", band_rows=rows * cell_px, peak_bytes=int(peak), host_bytes=0, flops=flops)


def vae_ladder(
    task: VaeTask, budget: int | None, *, names: tuple[str, ...] = VAE_POLICIES, band_rows: int | None = None
) -> tuple[BandStorage, ...]:
    """The policies whose peak fits a budget in bytes (weights not counted), fastest first; all `names` without a budget.

    band_rows: rows per band to try; by default `BAND_ROWS`. BudgetError, which gives the smallest sufficient budget, if no
    policy fits.
    """
    shape, cells, batch = task.shape, task.cells, task.batch
    rows_to_try = (band_rows,) if band_rows else BAND_ROWS
    ways = [(name, rows_to_try[0]) for name in names] + [(names[-1], rows) for rows in rows_to_try[1:]]
    rungs = [vae_policy(task, *way) for way in ways]
    if batch > 1:
        scaled = ((batch * r.peak_bytes, batch * r.host_bytes, batch * r.flops) for r in rungs)
        rungs = [replace(r, peak_bytes=p, host_bytes=h, flops=f) for r, (p, h, f) in zip(rungs, scaled, strict=True)]
    rungs = [rung for rung in rungs if indexable(shape, cells, rung.policy, batch, task.encode)] or rungs[:1]
    if budget is None:
        return tuple(rungs)
    fitting = tuple(rung for rung in rungs if rung.peak_bytes <= budget)
    if not fitting:
        least = min(rungs, key=lambda rung: rung.peak_bytes)
        raise BudgetError(f"{least} is above the budget of {gib(budget)}: {gib(least.peak_bytes)} would do")
    return fitting
