"""Upscaling: networks tiled and whole beside bicubic and Lanczos, memory of large files, what refinement adds and keeps.

    python -m benchmarks upscale quality           # Y-PSNR on x4 of downsampled photograph crops, tiled against whole
    python -m benchmarks upscale memory            # a photograph x4 beyond 16,000 px, and twice as tall
    python -m benchmarks upscale refine            # the shipped model on held-out scenes

Rows go to results/upscale_quality.csv, upscale_memory.csv and upscale_refine.csv. Needs the test data; `quality` needs spandrel
as well. The last line of stdout is one JSON document; the exit code is 1 where a limit of issue 8 is missed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import RESULTS, append_row, stamp
from benchmarks.demo.held_out import held_out_scenes
from benchmarks.demo.scenes import draw
from benchmarks.suites.io import DATA
from hires.images.boxes import luma
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.metrics.ciede2000 import ciede2000, lab
from hires.metrics.fidelity import band_energy
from hires.models.upscalers import UpscalerNetwork, load_upscaler
from hires.pipelines.upscale import PictureRows, bands_of, enlarge, plan_tiles
from hires.tiling.geometry import Size
from hires.tiling.network import Tiling
from tests.support.spandrel_here import why_not

CROPS = (
    ("kodim19.png", 200, 100),
    ("kodim19.png", 60, 64),
    ("kodim23.png", 100, 300),
    ("kodim23.png", 20, 20),
    ("flower_BSD3_2268x1512.png", 400, 600),
    ("Kleiber_CCBYSA3_6028x3391.jpg", 1500, 2700),
)
SIDE, SCALE = 384, 4
SAME_KERNELS = 3  # the crop on which rounding is largest
NETWORKS = ("RealESRGAN_General_x4_v3.safetensors", "craft_x4.pth")
ROOT = Path(__file__).parents[2]
PHOTO = DATA / "photos" / "Kleiber_CCBYSA3_6028x3391.jpg"
Picture = NDArray[np.uint8]


def crop(name: str, top: int, left: int) -> Picture:
    with Image.open(DATA / "photos" / name) as picture:
        return np.asarray(picture.convert("RGB"))[top : top + SIDE, left : left + SIDE]


def y_psnr(found: Picture, truth: Picture) -> float:
    """PSNR of BT.601's luma of 16 to 235 without a border of `SCALE` px, as papers on super-resolution measure it."""
    weights = np.asarray((65.481, 128.553, 24.966)) / 255
    inner = (slice(SCALE, -SCALE), slice(SCALE, -SCALE))
    error = ((found.astype(np.float64) - truth.astype(np.float64)) @ weights)[inner]
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def through(made: UpscalerNetwork | None, small: Picture, tiling: Tiling | None) -> NDArray[np.float32]:
    source = ImageSource.open(small)
    rows = bands_of(enlarge(source, None, source.size.times(SCALE), made, tiling), np.dtype(np.float32))
    return np.concatenate(list(rows))


def eight(picture: NDArray[np.float32]) -> Picture:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)


def quality(tiles: list[int]) -> Iterator[dict[str, object]]:
    """Mean Y-PSNR over the crops for every network and tile, and the largest difference to the network untiled."""
    truths = [crop(*place) for place in CROPS]
    side = (SIDE // SCALE, SIDE // SCALE)
    smalls = [np.asarray(Image.fromarray(truth).resize(side, Image.Resampling.BICUBIC)) for truth in truths]
    plain: dict[str, Callable[[Picture], Picture]] = {
        "bicubic": lambda small: np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)),
        "lanczos": lambda small: eight(through(None, small, None)),
    }
    for name, way in plain.items():
        yield _row(name, "whole", 0, 1, [way(small) for small in smalls], truths, 0.0)
    for name in NETWORKS:
        made = load_upscaler(DATA / "upscalers" / name, torch.device("cpu"))
        rows = [PictureRows(ImageSource.open(small), made.channels).rows(0, len(small)) for small in smalls]
        whole = [made.network(planes[None])[0] for planes in rows]
        pictures = [one.permute(1, 2, 0).numpy() for one in whole]
        yield _row(name, "whole", 0, 1, [eight(one) for one in pictures], truths, 0.0)
        for tile in tiles:
            tiled = [through(made, small, plan_tiles(made, Size(*small.shape[:2]), None, tile)) for small in smalls]
            apart = max(float(np.abs(a - b).max()) for a, b in zip(tiled, pictures, strict=True))
            same = _same_kernels(made, smalls[SAME_KERNELS], tile)
            kept, halo = [eight(one) for one in tiled], made.halo
            yield _row(name, f"tile {tile} + {halo.pixels}", halo.pixels, int(halo.exact), kept, truths, apart, same)


def _same_kernels(made: UpscalerNetwork, small: Picture, tile: int) -> float:
    """The largest difference of tiles to the whole by convolutions that do not depend on the shape: oneDNN's do, and a network
    that sharpens enlarges their rounding. On the crop where that is most."""
    planes = PictureRows(ImageSource.open(small), made.channels).rows(0, len(small))
    with torch.backends.mkldnn.flags(enabled=False):
        whole = made.network(planes[None])[0].permute(1, 2, 0).numpy()
        tiled = through(made, small, plan_tiles(made, Size(*small.shape[:2]), None, tile))
    return float(np.abs(tiled - whole).max())


def _row(
    name: str, way: str, halo: int, exact: int, found: list[Picture], truths: list[Picture], apart: float, same: float = 0.0
) -> dict[str, object]:
    db = [y_psnr(one, truth) for one, truth in zip(found, truths, strict=True)]
    return {
        "upscaler": name,
        "way": way,
        "halo_px": halo,
        "exact": exact,
        "crops": len(db),
        "y_psnr_db": round(float(np.mean(db)), 3),
        "max_abs_from_whole": f"{apart:.1e}",
        "max_abs_same_kernels": f"{same:.1e}",
    }


def quality_kept(rows: list[dict[str, object]]) -> bool:
    """The compact network's tiles are exact by the same kernels; CRAFT's within 0.1 dB of whole and 1.5 dB over bicubic."""
    db = {(str(row["upscaler"]), str(row["way"])): float(str(row["y_psnr_db"])) for row in rows}
    compact, craft = NETWORKS
    exact = all(float(str(row["max_abs_same_kernels"])) <= 1e-5 for row in rows if row["upscaler"] == compact)
    tiled = [value for (name, way), value in db.items() if name == craft and way != "whole"]
    near = all(db[craft, "whole"] - value <= 0.1 for value in tiled)
    return exact and near and all(value - db["bicubic", "whole"] >= 1.5 for value in tiled)


CHILD = """
import json, sys, torch, hires
from tests.support.spandrel_here import why_not
if sys.argv[4] != "lanczos":
    assert why_not() is None, why_not()
torch.set_num_threads(1)
result = hires.upscale(sys.argv[1], scale=4, output=sys.argv[2], bits=int(sys.argv[3]), upscaler=sys.argv[4])
print(json.dumps(result.to_json()))
"""


def memory(upscalers: list[str]) -> Iterator[dict[str, object]]:
    """The photograph and itself above its mirror image, x4 to files, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 2):
            source = _stacked(Path(folder) / f"in{times}.png", times)
            for name in upscalers:
                for suffix, bits in ((".png", 8), (".png", 16), (".tif", 8), (".tif", 16)):
                    target = Path(folder) / f"out{suffix}"
                    arguments = [str(source), str(target), str(bits), name]
                    command = [sys.executable, "-c", CHILD, *arguments]
                    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
                    found = json.loads(done.stdout.splitlines()[-1])
                    content = target.stat().st_size
                    target.unlink()
                    yield {
                        "upscaler": Path(name).name,
                        "format": suffix,
                        "bits": bits,
                        "source": found["source"] if times == 1 else f"{found['source']} (mirrored)",
                        "size": found["size"],
                        "file_mb": round(content / 1e6, 1),
                        "peak_rss_gib": round(found["peak_rss_bytes"] / 2**30, 3),
                    }


def _stacked(path: Path, times: int) -> Path:
    with Image.open(PHOTO) as opened:
        pixels = np.asarray(opened)
    with ImageSink.open(path, Size(times * len(pixels), pixels.shape[1])) as sink:
        for index in range(times):
            sink.write(pixels[::-1] if index % 2 else pixels)
    return path


def memory_kept(rows: list[dict[str, object]]) -> bool:
    """At most 1.5 GiB, and twice as tall at most 10 % more."""
    peaks: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        peaks.setdefault((row["upscaler"], row["format"], row["bits"]), []).append(float(str(row["peak_rss_gib"])))
    return all(max(found) <= 1.5 and found[-1] <= 1.1 * found[0] for found in peaks.values())


def refine(count: int, strengths: list[float]) -> Iterator[dict[str, object]]:
    """Held-out scenes of 256 px, drawn sharp and enlarged x4: energy above the input's Nyquist over Lanczos's, and how far the
    low-pass picture moves, mean dE2000 in the worst of 4 x 4 tiles."""
    import hires

    for index, scene in enumerate(held_out_scenes(count)):
        small = eight(draw(scene, Size(256, 256)))
        base = hires.upscale(small, scale=4).pixels
        energy = band_energy(luma(base), 256 / 1024 / 2)
        truth = band_energy(luma(eight(draw(scene, Size(1024, 1024)))), 256 / 1024 / 2) / energy
        for strength in strengths:
            result = hires.upscale(small, scale=4, refine=True, strength=strength, prompt=scene.caption)
            apart = ciede2000(_tiles(result.pixels), _tiles(base)).mean(-1)
            yield {
                "scene": index,
                "strength": strength,
                "size": str(result.size),
                "energy_over_lanczos": round(band_energy(luma(result.pixels), 256 / 1024 / 2) / energy, 2),
                "truth_over_lanczos": round(truth, 2),
                "worst_tile_de2000": round(float(apart.max()), 3),
                "mean_de2000": round(float(apart.mean()), 3),
            }


def _tiles(pixels: Picture, tiles: int = 4, to: int = 256) -> NDArray[np.float64]:
    """L*a*b* of the picture averaged to `to` px, (tiles, tiles, pixels of one, 3)."""
    by, side = pixels.shape[0] // to, to // tiles
    small = pixels.reshape(to, by, to, by, 3).mean((1, 3)) / 255
    found: NDArray[np.float64] = lab(small).reshape(tiles, side, tiles, side, 3).swapaxes(1, 2).reshape(tiles, tiles, -1, 3)
    return found


def refine_kept(rows: list[dict[str, object]]) -> bool:
    return all(float(str(row["energy_over_lanczos"])) >= 3 and float(str(row["worst_tile_de2000"])) <= 2 for row in rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks upscale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("quality", "memory", "refine"))
    parser.add_argument("--tiles", default="32,48,64", help="quality: sides in px of the input")
    parser.add_argument("--upscalers", default="lanczos", help="memory: lanczos or files, with commas")
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--strengths", default="0.25,0.35")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    lacking = why_not() if args.part == "quality" else None
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 2
    made: dict[str, tuple[Callable[[], Iterator[dict[str, object]]], Callable[[list[Any]], bool]]] = {
        "quality": (lambda: quality([int(tile) for tile in args.tiles.split(",")]), quality_kept),
        "memory": (lambda: memory(args.upscalers.split(",")), memory_kept),
        "refine": (lambda: refine(args.scenes, [float(one) for one in args.strengths.split(",")]), refine_kept),
    }
    measure, kept = made[args.part]
    rows = []
    for row in measure():
        rows.append(stamp() | row)
        append_row(args.csv or RESULTS / f"upscale_{args.part}.csv", rows[-1])
        print(row, file=sys.stderr)
    print(json.dumps({"suite": f"upscale {args.part}", "rows": rows}))
    return 0 if kept(rows) else 1
