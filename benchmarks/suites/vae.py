"""The full SDXL autoencoder (random weights): the module, every storage policy and diffusers' own tiling, in one run.

    python -m benchmarks vae --size 1024x1024
    python -m benchmarks vae --size 512x512 --repeats 1 --defaults-at 0x0      # a minute on two cores

Per way: seconds (median, repeats interleaved), peak bytes measured (resident memory on a CPU, the allocator's on a card),
of the operators' results (fake tensors) and predicted, FLOPs counted, and against the module PSNR, largest difference and
seam score. diffusers' tiles are 512 px with 25 % overlap at `--size`; its defaults run once at `--defaults-at`, beside the
bands, which stand for the whole there. Rows are appended to results/vae.csv; the exit code is 1 where a limit is broken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.allocations import counted
from benchmarks.common import RESULTS, append_row, stamp
from hires._imports import quiet_imports
from hires.devices.memory import peak_resident_bytes, reset_resident_peak
from hires.devices.probe import choose_device
from hires.errors import HiresError
from hires.images.boxes import Floats
from hires.metrics.fidelity import psnr
from hires.metrics.seams import seam_score
from hires.options.sizes import parse_size
from hires.tiling.bands.storage import VAE_POLICIES, BandStorage
from hires.tiling.geometry import Size, bands
from hires.tiling.vae import TiledVAE

COLUMNS = (
    "side", "way", "seconds", "over_first", "peak_mib", "predicted_mib", "gflop", "psnr_db", "max_abs", "seam_over_control",
)  # fmt: skip
Decode = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """One way to decode: its name, how, and the rows and columns where its pieces meet."""

    name: str
    decode: Decode
    predicted_bytes: int
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()


def sdxl_vae(device: torch.device) -> nn.Module:
    """The architecture of the SDXL autoencoder with random weights, float32."""
    with quiet_imports():
        from diffusers import AutoencoderKL
    torch.manual_seed(0)
    with device:
        vae: nn.Module = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=1024,
        )
    return vae.eval().requires_grad_(False)


def untiled(vae: nn.Module, z: Tensor) -> Tensor:
    module: Any = vae
    module.disable_tiling()
    picture: Tensor = module.decode(z).sample
    return picture


def diffusers_tiling(tile_px: int | None) -> Decode:
    """`enable_tiling()` with tiles of that size, or with its defaults."""

    def decode(vae: nn.Module, z: Tensor) -> Tensor:
        module: Any = vae
        before = module.tile_sample_min_size, module.tile_latent_min_size
        module.enable_tiling()
        if tile_px is not None:
            module.tile_sample_min_size, module.tile_latent_min_size = tile_px, tile_px // 8
        picture: Tensor = module.decode(z).sample
        module.disable_tiling()
        module.tile_sample_min_size, module.tile_latent_min_size = before
        return picture

    return decode


def banded(policy: str, band_px: int | None, window: int | None = None) -> Decode:
    def decode(vae: nn.Module, z: Tensor) -> Tensor:
        return TiledVAE(vae, policy=policy, band_px=band_px, attention_window=window).decode(z)

    return decode


def ways_at(vae: nn.Module, size: Size, band_px: int | None, tile_px: int | None, names: list[str]) -> list[Way]:
    """The ways to compare at a size; `names` of `VAE_POLICIES`, `untiled`, `diffusers tiling`, `window`."""
    cells = size.divided(8)

    def plan(policy: str, window: int | None = None) -> BandStorage:
        return TiledVAE(vae, policy=policy, band_px=band_px, attention_window=window).plan(cells.height, cells.width)[0]

    shared = next(vae.parameters()).device.type == "cpu"  # there host memory is the same memory
    ways = []
    for name in names:
        if name == "untiled":
            ways.append(Way(name, untiled, plan("whole").peak_bytes))
        elif name == "diffusers tiling":
            side = (tile_px or 1024) * 3 // 4
            lines = (tuple(range(side, extent, side)) for extent in (size.height, size.width))
            ways.append(Way(name, diffusers_tiling(tile_px), 0, *lines))
        else:
            window = 32 if name == "window" else None
            policy = "bands" if name == "window" else name
            made = plan(policy, window)
            rows = tuple(top for top, _ in bands(size.height, made.band_rows or size.height))[1:]
            label = f"{policy}, attention over {window} rows" if window else f"hires {policy}"
            predicted = made.peak_bytes + (made.host_bytes if shared else 0)
            ways.append(Way(label, banded(policy, band_px, window), predicted, rows))
    return ways


def counts(way: Way, cells: Size) -> tuple[int, float]:
    """Peak bytes of what operators make, and FLOPs, on fake tensors: no memory, no arithmetic."""
    with counted() as found:
        vae = sdxl_vae(torch.device("cpu"))
        z = torch.empty(1, 4, cells.height, cells.width)
        found.live = found.peak = 0
        with FlopCounterMode(display=False) as flops:
            way.decode(vae, z)
    return found.peak, float(flops.get_total_flops())


def timed(way: Way, vae: nn.Module, z: Tensor) -> tuple[Tensor, float, int]:
    """The picture, seconds, and peak bytes above those held before."""
    cuda = z.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
    else:
        reset_resident_peak()
        before = peak_resident_bytes()
    begun = time.perf_counter()
    with torch.inference_mode():
        picture = way.decode(vae, z)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    peak = (torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()) - before
    return picture.cpu(), seconds, peak


def luma_of(picture: Tensor, span: tuple[float, float]) -> Floats:
    """Mean of the channels, the module's range moved to [0, 1]."""
    low, high = span
    result: Floats = ((picture[0].mean(dim=0) - low) / (high - low)).numpy()
    return result


def compare(vae: nn.Module, size: Size, ways: list[Way], repeats: int, csv_path: Path) -> list[dict[str, Any]]:
    """Run the ways in turn, `repeats` rounds; the first way is what the others are measured against."""
    cells = size.divided(8)
    z = torch.randn(1, 4, cells.height, cells.width, generator=torch.Generator().manual_seed(0)).to(
        next(vae.parameters()).device
    )
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    peaks: dict[str, int] = {}
    quality: dict[str, dict[str, float]] = {}
    reference = torch.empty(0)
    for index in range(repeats + 1):  # round 0 warms up at a quarter of the size and is not counted
        for way in ways:
            if index == 0:
                timed(way, vae, z[..., : cells.height // 2, : cells.width // 2].contiguous())
                continue
            picture, taken, peak = timed(way, vae, z)
            seconds[way.name].append(taken)
            peaks[way.name] = max(peaks.get(way.name, 0), peak)
            print(f"{size} {way.name}: {taken:.2f} s", file=sys.stderr, flush=True)
            if index == 1:
                reference = picture if way is ways[0] else reference
                span = float(reference.min()), float(reference.max())
                quality[way.name] = {
                    "psnr_db": round(psnr(picture.numpy(), reference.numpy(), span[1] - span[0]), 1),
                    "max_abs": float((picture - reference).abs().max()),
                    "seam_over_control": round(seam_score(luma_of(picture, span), way.rows, way.cols), 3),
                }
    rows = []
    base = statistics.median(seconds[ways[0].name])
    for way in ways:
        tracked, flops = counts(way, cells)
        row = stamp() | {
            "side": str(size),
            "way": way.name,
            "against": ways[0].name,
            "seconds": round(statistics.median(seconds[way.name]), 3),
            "over_first": round(statistics.median(seconds[way.name]) / base, 3),
            "fastest_over_first": round(min(seconds[way.name]) / min(seconds[ways[0].name]), 3),
            "repeats": repeats,
            "peak_mib": round(peaks[way.name] / 2**20),
            "tracked_mib": round(tracked / 2**20),
            "predicted_mib": round(way.predicted_bytes / 2**20),
            "gflop": round(flops / 1e9, 1),
            "gflop_per_s": round(flops / 1e9 / statistics.median(seconds[way.name]), 1),
            **quality[way.name],
        }
        append_row(csv_path, row)
        rows.append(row)
    return rows


def limits(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What the exact ways promise against the module: bands are not slower, nothing differs by more than rounding."""
    verdict = {}
    for row in rows:
        if row["way"].startswith("hires ") and row["against"] == "untiled":
            name = f"{row['side']} {row['way']}: "
            verdict[name + "PSNR >= 110 dB"] = row["psnr_db"] >= 110
            verdict[name + "max abs <= 1e-4"] = row["max_abs"] <= 1e-4
            if row["way"] == "hires bands":
                verdict[name + "seconds <= untiled"] = row["over_first"] <= 1.0
    return verdict


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks vae", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="1024x1024", help="width x height, whole cells of 8 px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--band", type=int, default=None, help="rows of a feature map at a time (default 64)")
    parser.add_argument("--defaults-at", default="2048x2048", help="size of the row with diffusers' default tiles; 0x0: none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--csv", type=Path, default=RESULTS / "vae.csv")
    args = parser.parse_args(argv)
    try:
        size, device = parse_size(args.size), choose_device(args.device)
        larger = None if args.defaults_at == "0x0" else parse_size(args.defaults_at)
    except HiresError as error:
        parser.error(str(error))
    if args.repeats < 1 or any(side % 8 for one in (size, larger) if one for side in (one.height, one.width)):
        parser.error("--repeats from 1, sizes in whole cells of 8 px")
    vae = sdxl_vae(device)
    names = ["untiled", *VAE_POLICIES, "window", "diffusers tiling"]
    rows = compare(vae, size, ways_at(vae, size, args.band, 512, names), args.repeats, args.csv)
    if larger is not None:
        rows += compare(vae, larger, ways_at(vae, larger, args.band, None, ["bands", "diffusers tiling"]), 1, args.csv)
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in COLUMNS]
    for line in (dict(zip(COLUMNS, COLUMNS, strict=True)), *rows):
        print("  ".join(str(line[c]).rjust(w) for c, w in zip(COLUMNS, widths, strict=True)))
    verdict = limits(rows)
    print(json.dumps({"suite": "vae", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
