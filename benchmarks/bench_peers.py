"""Beside what a user would pick instead, on the same weights and seeds: diffusers, TAESD, halving, Pillow, at their defaults.

    python -m benchmarks peers vae                 # full width, random weights: 512, 1024 px (2048: the suite vae)
    python -m benchmarks peers pipelines           # the shipped model by diffusers' own SDXL pipeline, 1024 px
    python -m benchmarks peers attention           # whole canvases under every policy, one PixArt layer's shapes
    python -m benchmarks peers upscale             # a network whole, halved until it fits as chaiNNer does, and tiled by us
    python -m benchmarks peers io                  # memory of writing, beside Pillow
    python -m benchmarks peers --quick             # every code path at toy sizes, no rows

Rows have seconds, peak resident memory beyond what was held before, quality and the versions of both sides; each is a process
of its own and goes to results/peers.csv at once, so that a run that was stopped goes on. PSNR is against the untiled module;
TAESD's weights are others.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_io import DATA
from benchmarks.children import in_child
from benchmarks.common import RESULTS, append_row, read_rows, stamp
from tests.spandrel_here import why_not

KINDS = ("vae", "pipelines", "attention", "upscale", "io")
KEY = ("kind", "way", "size")
VAE_WAYS = (
    "diffusers, untiled", "diffusers, enable_tiling", "diffusers, tiles of 512 px", "diffusers, enable_slicing",
    "hires, fastest in 2 GB", "hires, least memory", "TAESDXL (another, smaller decoder)",
)  # fmt: skip
PIPELINE_WAYS = (
    "diffusers, plain",
    "diffusers, plain, enable_vae_tiling",
    "hires.attach, tiles from noise",
    "hires, balanced",
    "hires, fast",
)
ATTENTION_WAYS = ("global", "npa", "windows", "kvpool")
UPSCALE_WAYS = ("spandrel, whole", "halved until it fits", "hires, tiled")
IO_WAYS = ("Pillow", "hires")
PROMPT = "a sun on the right over green mountains and a lake at dusk"


def cases(kind: str, quick: bool) -> Iterator[tuple[str, str]]:
    """(way, size) of a kind."""
    ways: dict[str, tuple[str, ...]] = {
        "vae": VAE_WAYS, "pipelines": PIPELINE_WAYS, "attention": ATTENTION_WAYS, "upscale": UPSCALE_WAYS, "io": IO_WAYS,
    }  # fmt: skip
    full = {"vae": (512, 1024), "pipelines": (1024,), "attention": (2048,), "upscale": (512,), "io": (8192,)}
    small = {"vae": (128,), "pipelines": (256,), "attention": (512,), "upscale": (64,), "io": (512,)}
    for side in (small if quick else full)[kind]:
        for way in ways[kind]:
            yield way, f"{side}x{side}"


def measured(run: Callable[[], Any], warm: Callable[[], Any] | None = None) -> tuple[Any, dict[str, Any]]:
    """The result of one call, its seconds, and the resident bytes beyond those before."""
    import torch

    from hires.benching.rows import resident_from_now
    from hires.device import peak_resident_bytes

    with torch.inference_mode():
        if warm is not None:
            warm()
        before = resident_from_now() or 0
        begun = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - begun
    return found, {"seconds": round(seconds, 3), "peak_mib": round((peak_resident_bytes() - before) / 2**20, 1)}


def vae(way: str, side: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Decode random latents of full width."""
    import torch

    from benchmarks.random_models import vae_of
    from hires.device import return_pages
    from hires.metrics import luma, psnr, seam_score
    from hires.tiling.halo import HaloVAE
    from hires.tiling.vae import TiledVAE

    return_pages()
    module: Any = vae_of(quick, "fp32", torch.device("cpu"))
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    rows: tuple[int, ...] = ()
    if way.startswith("TAESD"):
        from diffusers import AutoencoderTiny

        tiny = AutoencoderTiny.from_pretrained(DATA / "taesdxl").eval()
        _, taken = measured(lambda: HaloVAE(tiny, budget_bytes=2 * 10**9).decode(z))
        return taken | {"measure": "other weights", "quality": "", "seam": ""}
    module.disable_tiling()
    if "enable_tiling" in way or "tiles of" in way:
        module.enable_tiling()
        if "512" in way:
            module.tile_sample_min_size, module.tile_latent_min_size = 512, 64
        step = int(module.tile_sample_min_size * 0.75)
        rows = tuple(range(step, side, step))
    if "slicing" in way:
        module.enable_slicing()
    tiled = {
        "hires, fastest in 2 GB": TiledVAE(module, budget_bytes=2 * 10**9)
        if side <= 1024
        else TiledVAE(module, policy="bands"),
        "hires, least memory": TiledVAE(module, policy="recompute_conv", band_px=64),
    }.get(way)
    picture, taken = measured(lambda: module.decode(z).sample if tiled is None else tiled.decode(z))
    found = picture[0].permute(1, 2, 0).numpy()
    reference = folder / f"vae-{side}.npy"
    if not reference.exists():
        np.save(reference, found)
    same = min(999.0, psnr(found, np.load(reference), 2.0))
    seam = seam_score(luma((found - found.min()) / np.ptp(found)), rows, rows) if rows else 1.0
    return taken | {"measure": "PSNR dB", "quality": round(same, 2), "seam": round(float(seam), 3)}


def pipelines(way: str, side: int, folder: Path, quick: bool) -> dict[str, Any]:
    """The shipped model: how many suns there are where the caption has one, and detail over the base picture's."""
    import torch

    import hires
    from hires.metrics import find_disks, lopsided_disks
    from hires.quiet import quiet_imports
    from hires.specs import load_spec

    with quiet_imports():
        from diffusers import StableDiffusionXLPipeline

        pipe = StableDiffusionXLPipeline.from_pretrained(
            load_spec("demo").path, variant="fp16", torch_dtype=torch.float32, add_watermarker=False
        )
    pipe.set_progress_bar_config(disable=True)

    def theirs(px: int, steps: int) -> Any:
        return np.asarray(
            pipe(
                PROMPT,
                height=px,
                width=px,
                num_inference_steps=steps,
                guidance_scale=2.0,
                generator=torch.Generator().manual_seed(1),
            ).images[0]
        )

    if way.startswith("hires,"):
        preset = way.split(", ")[1]
        pixels, taken = measured(
            lambda: hires.render(PROMPT, size=(side, side), preset=preset, seed=1, vram="2GB").pixels,
            lambda: hires.render(PROMPT, size="64x64", steps=1, vram="2GB"),
        )
    else:
        if "vae_tiling" in way:
            pipe.vae.enable_tiling()
        if way.startswith("hires.attach"):
            hires.attach(pipe, vram="2GB")
        pixels, taken = measured(lambda: theirs(side, 4 if quick else 24), lambda: theirs(64, 1))
    picture = pixels.astype(np.float32) / 255
    suns = len(find_disks(picture)) + len(lopsided_disks(picture, find_disks(picture)))
    return taken | {"measure": "suns drawn, one is right", "quality": suns, "seam": ""}


def attention(way: str, side: int, folder: Path, quick: bool) -> dict[str, Any]:
    """Self-attention of a PixArt block over a canvas, windows of its trained 1024 px."""
    import torch

    from hires.kernels.dispatch import attention as attend
    from hires.kernels.policies import NPA, Global, KVPool, Policy, Windows

    cells = side // 16
    window = min(64, cells // 2)
    policies: dict[str, Policy] = {"global": Global(), "npa": NPA(window), "windows": Windows(window), "kvpool": KVPool(2)}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, cells * cells, 16, 72, generator=generator).transpose(1, 2) for _ in range(3))

    def run() -> Any:
        return attend(q, k, v, canvas=(cells, cells), policy=policies[way])

    found, taken = measured(run, run)
    exact = attend(q, k, v, canvas=(cells, cells), policy=Global())
    error = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return taken | {"measure": "rms from global, random tokens", "quality": round(error, 4), "seam": ""}


def upscale(way: str, side: int, folder: Path, quick: bool) -> dict[str, Any]:
    """RealESRGAN General x4 v3 on a part of a photograph, where half a GiB is what there is."""
    import torch
    from PIL import Image

    from hires.metrics import luma, psnr, seam_score
    from hires.pipelines.upscale import load_upscaler
    from hires.upscale_options import UpscaleOptions
    from hires.upscaling import Batch

    reason = why_not()
    if reason is not None:
        return {"state": f"skipped: {reason}"}
    file = DATA / "upscalers" / "RealESRGAN_General_x4_v3.safetensors"
    with Image.open(DATA / "photos" / "flower_BSD3_2268x1512.png") as opened:
        picture = np.asarray(opened.convert("RGB").crop((700, 400, 700 + side, 400 + side)))
    module: Any = load_upscaler(file, torch.device("cpu")).network
    x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    most = side // 2  # pixels a side that a tile of the halving peer may have, where more would be out of memory

    def halved(part: Any) -> Any:
        """Whole where it fits, else its four quarters, cut without a halo and put together."""
        if max(part.shape[-2:]) <= most:
            return module(part)
        h, w = part.shape[-2] // 2, part.shape[-1] // 2
        rows = [
            torch.cat([halved(part[..., a, b]) for b in (slice(0, w), slice(w, None))], -1)
            for a in (slice(0, h), slice(h, None))
        ]
        return torch.cat(rows, -2)

    def coded(found: Any) -> Any:
        return (found[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)

    batch = Batch(UpscaleOptions(scale=4, upscaler=str(file), tile_px=most, device="cpu"))
    batch.prepare()  # the network is loaded and its halo measured once
    ways: dict[str, Callable[[], Any]] = {
        "spandrel, whole": lambda: coded(module(x)),
        "halved until it fits": lambda: coded(halved(x)),
        "hires, tiled": lambda: batch.run(picture).pixels,
    }
    found, taken = measured(ways[way], lambda: module(x[..., :32, :32]))
    reference = folder / f"upscale-{side}.npy"
    if not reference.exists():
        np.save(reference, found)
    whole = np.load(reference)
    lines = tuple(range(4 * most, 4 * side, 4 * most)) if way != "spandrel, whole" else ()
    same = min(999.0, psnr(found.astype(np.float32), whole.astype(np.float32), 255.0))
    seam = seam_score(luma(found.astype(np.float32) / 255), lines, lines) if lines else 1.0
    return taken | {"measure": "PSNR dB", "quality": round(same, 2), "seam": round(float(seam), 3)}


def io(way: str, side: int, folder: Path, quick: bool) -> dict[str, Any]:
    """A PNG of 8 bits written from bands as they are made."""
    from PIL import Image

    from benchmarks.bench_io import mosaic
    from hires.imageio import ImageSink
    from hires.tiling.geometry import Size

    path, size = folder / "a.png", Size(side, side)

    def ours() -> None:
        with ImageSink.open(path, size, overwrite=True) as sink:
            for band in mosaic(size, "uint8"):
                sink.write(band)

    def pillow() -> None:
        Image.fromarray(np.concatenate(list(mosaic(size, "uint8")))).save(path)

    _, taken = measured(ours if way == "hires" else pillow)
    return taken | {"measure": "bits a pixel", "quality": round(8 * path.stat().st_size / size.area, 3), "seam": ""}


def versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "pillow", "torch"))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        kind, way, side, folder, quick = arguments[1:6]
        run = {"vae": vae, "pipelines": pipelines, "attention": attention, "upscale": upscale, "io": io}[kind]
        print(json.dumps(run(way, int(side), Path(folder), quick == "quick")))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="toy sizes, no rows")
    parser.add_argument("--csv", action="store_true", help="append rows to results/peers.csv; those there are kept")
    parser.add_argument("--folder", type=Path, default=Path("runs/peers"), help="where references are kept")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.kinds) - set(KINDS))
    if unknown:
        parser.error(f"unknown kind {unknown[0]}: give some of {', '.join(KINDS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder / ("quick" if options.quick else "full")
    folder.mkdir(exist_ok=True)
    path, rows = RESULTS / "peers.csv", []
    there = {tuple(row[name] for name in KEY) for row in read_rows(path)} if options.csv else set()
    for kind in options.kinds or KINDS:
        for way, size in cases(kind, options.quick):
            if (kind, way, size) in there or (needs_data(kind, way) and not DATA.is_dir()):
                continue
            found = in_child(
                "peers", kind, way, size.split("x")[0], str(folder), "quick" if options.quick else "full", timeout=900
            )
            row = stamp() | {"versions": versions(), "kind": kind, "way": way, "size": size} | {"state": "ran"} | found
            row |= {name: row.get(name, "") for name in ("seconds", "peak_mib", "measure", "quality", "seam")}
            rows.append(row)
            print(f"{kind} {size} {way}: {found}", flush=True)
            if options.csv:
                append_row(path, row)
    print(json.dumps({"rows": rows}))
    return 0


def needs_data(kind: str, way: str) -> bool:
    return kind == "upscale" or way.startswith("TAESD")
