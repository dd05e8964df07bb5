"""How seconds and memory grow with the picture: one evaluation of the tiled denoiser, and the exact decode into a file.

    python -m benchmarks scaling                       # the shipped model, 512 to 8192 px
    python -m benchmarks scaling --quick               # 256 and 512 px, no rows

Each row is a process of its own on one thread. The exponent is that of pixels, fitted to the logarithms over the sizes from
1024 px on: 1 is linear. `attention_share` is attention's part of the FLOPs of a tile, which does not grow. Rows go to
results/scaling.csv; the last line of stdout is one JSON document; the exit code is 1 where tiled denoise or decode grow faster
than pixels^1.05, or host memory faster than pixels^0.6.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import in_child
from benchmarks.common import RESULTS, append_row, read_rows, stamp

SIDES = (512, 1024, 2048, 4096, 8192)
WHATS = ("denoise in tiles", "decode into a file")
LIMITS = {"seconds": 1.05, "peak": 1.05, "host": 0.6}
FITTED_FROM = 1024
KEY = ("what", "side", "commit")


def measure(what: str, side: int) -> dict[str, Any]:
    """Seconds and bytes of one call, after a small one to warm up; run as `--child`."""
    import torch

    from hires.benching.rows import resident_from_now
    from hires.cost import attention_flops, network_flops
    from hires.device import peak_resident_bytes, return_pages
    from hires.execute import load_family
    from hires.imageio import ImageSink
    from hires.machines import host_device
    from hires.pipelines.progressive import attending
    from hires.planner import plan
    from hires.specs import load_spec
    from hires.tiling.denoise import tiled
    from hires.tiling.geometry import Size
    from hires.tiling.retry import Batcher, Ladder
    from hires.types import RenderRequest

    return_pages()
    spec = load_spec("demo")
    # the budget is so small that the decode holds bands, as a card's does at full width
    made = plan(RenderRequest(prompt="a lake", size=Size(side, side), strategy="tiled", steps=2), spec, host_device(2**30))
    family = load_family(
        RenderRequest(prompt="a lake", size=Size(side, side)), made, spec, torch.device("cpu"), Ladder([made.decode], str), None
    )
    stage = made.stages[-1]

    def denoised(cells: int) -> None:
        from hires.tiling.geometry import make_grid

        grid = make_grid(Size(cells, cells), stage.grid.tile, 8)
        x = torch.randn(1, 4, cells, cells) * stage.sigma_start
        on_canvas = tiled(family.denoiser(attending(stage.attention, None)), grid, batch=Batcher(4))
        denoise, cond = family.guided(on_canvas, stage)
        denoise(x, stage.sigma_start, cond)

    def decoded(cells: int) -> None:
        from hires.kernels.blend import to_integers
        from hires.tiling.vae import TiledVAE

        tiled_vae = TiledVAE(family.vae.vae, policy="recompute_conv", band_px=64)
        with (
            tempfile.TemporaryDirectory() as folder,
            ImageSink.open(Path(folder) / "a.png", Size(8 * cells, 8 * cells)) as sink,
        ):
            for band in tiled_vae.decode_bands(torch.randn(1, 4, cells, cells)):
                sink.write(to_integers(band[0], 8).numpy())

    run = denoised if what == WHATS[0] else decoded
    with torch.inference_mode():
        run(64)
        before = resident_from_now() or 0
        begun = time.perf_counter()
        run(side // 8)
        seconds = time.perf_counter() - begun
    tile = stage.grid.tile
    share = attention_flops(spec.network, tile.height, tile.width) / network_flops(spec.network, tile.height, tile.width)
    latents = 4 * 4 * (side // 8) ** 2
    peak = peak_resident_bytes() - before
    return {
        "seconds": round(seconds, 3),
        "peak_mib": round(peak / 2**20, 2),
        "rss_mib": round(peak_resident_bytes() / 2**20, 1),
        "latents_mib": round(latents / 2**20, 3),
        "attention_share": round(share, 4) if what == WHATS[0] else 0.0,
    }


def exponent(rows: list[dict[str, Any]], column: str) -> float | None:
    """The slope of log(column) over log(pixels); None for fewer than two sizes."""
    own = [(2 * np.log(float(row["side"])), np.log(float(row[column]))) for row in rows if float(row[column]) > 0]
    if len(own) < 2:
        return None
    x, y = np.array(own).T
    return float(np.polyfit(x, y, 1)[0])


def fitted(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """The exponents of each measurement."""
    large = [row for row in rows if int(row["side"]) >= FITTED_FROM] if len({row["side"] for row in rows}) > 2 else rows
    found: dict[str, float | None] = {}
    for what in WHATS:
        own = [row for row in large if row["what"] == what]
        found[f"{what}: seconds"] = exponent(own, "seconds")
        found[f"{what}: peak"] = exponent(own, "peak_mib")
        found[f"{what}: host"] = exponent(own, "rss_mib")
    return found


def kept(found: dict[str, float | None]) -> bool:
    """Whether every exponent is within its limit."""
    return all(value is None or value <= LIMITS[name.rsplit(": ", 1)[1]] for name, value in found.items())


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        print(json.dumps(measure(arguments[1], int(arguments[2]))))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--sides", default=",".join(map(str, SIDES)))
    parser.add_argument("--quick", action="store_true", help="256 and 512 px, no rows, no limits")
    parser.add_argument("--csv", action="store_true", help="append rows to results/scaling.csv; those there are kept")
    options = parser.parse_args(arguments)
    sides = (256, 512) if options.quick else tuple(int(side) for side in options.sides.split(","))
    path, head, rows = RESULTS / "scaling.csv", stamp(), []
    there = {tuple(row[name] for name in KEY): row for row in read_rows(path)}
    for what in WHATS:
        for side in sides:
            row: dict[str, Any] = there.get((what, str(side), head["commit"]), {}) if options.csv else {}
            if not row:
                row = head | {"what": what, "side": side} | in_child("scaling", what, str(side), threads=1, timeout=600)
                if options.csv:
                    append_row(path, row)
            rows.append(row)
            print(f"{what} {side}: {row['seconds']} s, {row['peak_mib']} MiB beyond what was held", flush=True)
    found = fitted(rows)
    print(json.dumps({"exponents": found}))
    return 0 if options.quick else int(not kept(found))
