"""How cost grows with the picture: a tiled estimate, exact decoding, and what a host holds beside a device, 1K to 16K.

    python -m benchmarks scaling                       # rows that would take over ten minutes say so
    python -m benchmarks scaling --quick               # 256 and 512 px, into no file

denoise: one guided estimate of the shipped model in tiles. decode: its autoencoder in bands, maps kept and recomputed.
sdxl/4: the SDXL autoencoder at a quarter of its width, with the attention over all tokens whose seconds stand apart. host:
latents in memory and a small autoencoder in bands into a PNG, as a host has them whose device does the rest. Exponents are of
seconds (medians over at least 20 s), or bytes, over pixels, by least squares in logarithms. The last line of stdout is one JSON
document; the exit code is 1 where seconds without attention or peak grow faster than pixels^1.05, or the host's memory than
pixels^0.6.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.rows import STATE, Row, Suite, carried_out, child, newest, sides_of, timed

SUITE = Suite(
    name="scaling",
    key=("part", "side"),
    columns=("tiles", "p20_s", "p50_s", "p80_s", "repeats", "attention_s", "gflop", "peak_mib", "process_mib"),
    code=("bench_scaling",),
)
SIDES = (1024, 2048, 4096, 8192, 16384)
PARTS = {"denoise": 16384, "decode, bands": 4096, "decode, recompute_conv": 8192, "sdxl/4, bands": 4096, "host": 16384}
"""Every part and the largest side that it is tried at."""
LINEAR, HOST = 1.05, 0.6
WARMED = 2048  # larger sides run once: their rows are long enough
LEAST_S = 20.0  # that a side is measured for, so that small ones do not find the machine at its best


@contextmanager
def attention_clock() -> Iterator[list[float]]:
    """Seconds of every call of attention while it is open."""
    from hires.models import attention_processors
    from hires.tiling.bands import layers

    places: list[tuple[Any, str]] = [(attention_processors, "attention"), (layers, "attention"), (layers, "attention_streamed")]
    spent: list[float] = []

    def clocked(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = run(*args, **kwargs)
            spent.append(time.perf_counter() - begun)
            return result

        return call

    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, clocked(getattr(module, name))))
        yield spent


def measured(case: Mapping[str, str]) -> Row:
    """One part at one size, in this process."""
    import torch

    from hires.devices.memory import freed_pages, peak_resident_bytes

    part, side = case["part"], int(case["side"])
    made = {"denoise": denoise, "host": host}.get(part)
    run, smaller, facts = made(side) if made else decode(side, *part.split(", "))
    with freed_pages("kept"), torch.inference_mode(), attention_clock() as spent:  # as a render does on a CPU
        smaller()
        begun = time.perf_counter()
        if side <= WARMED:
            run()  # how long it takes, and fresh pages filled
        repeats = max(1, round((LEAST_S if side >= 1024 else 0.2) / (time.perf_counter() - begun))) if side <= WARMED else 1
        spent.clear()
        _, found = timed(run, repeats)
    return found | facts | {
        "attention_s": round(statistics.median(sum(each) for each in in_turns(spent, repeats)), 3),
        "process_mib": round(peak_resident_bytes() / 2**20, 1),
    }  # fmt: skip


def in_turns(spent: Sequence[float], repeats: int) -> list[Sequence[float]]:
    """The calls of each repeat, all having as many."""
    each = len(spent) // repeats
    return [spent[index * each : (index + 1) * each] for index in range(repeats)]


Runs = tuple[Callable[[], Any], Callable[[], Any], Row]


def denoise(side: int) -> Runs:
    """One evaluation of the last stage of the shipped model on that canvas, by every condition that the stage is guided by."""
    import torch

    from hires.checkpoints.spec import load_spec
    from hires.devices import machines
    from hires.options.render import RenderRequest
    from hires.pipelines.base import Runtime
    from hires.pipelines.load import load_session
    from hires.planning import planner
    from hires.planning.costs.evaluations import estimates_per_step
    from hires.planning.costs.flops import network_flops
    from hires.tiling.denoise import tiled
    from hires.tiling.geometry import Size, make_grid

    spec = load_spec("demo")
    request = RenderRequest(prompt="a moon on the left over blue mountains and a lake at night", size=Size(side, side))
    plan = planner.plan(request, spec, machines.host_device())
    family = load_session(request, plan, spec, Runtime.of(request, plan, torch.device("cpu")))
    stage = plan.stages[-1]
    x = torch.randn(1, 4, *canvas_of(stage.grid.canvas), generator=torch.Generator().manual_seed(0))

    def estimate(grid: Any) -> Any:
        on_canvas = tiled(family.denoiser(), grid, batch=stage.batch)
        guided, cond = family.guided(on_canvas, stage)
        return guided(x[..., : grid.canvas.height, : grid.canvas.width], stage.sigma_start, cond)

    native = stage.grid.tile
    flops = estimates_per_step(stage, spec) * stage.grid.count * network_flops(spec.network, native.height, native.width)
    facts = {"tiles": stage.grid.count, "gflop": round(flops / 1e9, 1)}
    return lambda: estimate(stage.grid), lambda: estimate(make_grid(native, native, 0)), facts


def canvas_of(cells: Any) -> tuple[int, int]:
    return cells.height, cells.width


def decode(side: int, model: str, policy: str) -> Runs:
    """An autoencoder by one storage policy, its rows thrown away as they come."""
    import torch

    from hires.checkpoints.spec import load_spec
    from hires.models.loading import load_vae
    from hires.tiling.vae import TiledVAE

    vae = narrow_vae() if model == "sdxl/4" else load_vae(load_spec("demo"), torch.float32, torch.device("cpu"))
    way = TiledVAE(vae.to(memory_format=torch.channels_last), policy=policy)  # type: ignore[call-overload]
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))

    def run(cells: int) -> None:
        for _ in way.decode_bands(z[..., :cells, :cells].contiguous(memory_format=torch.channels_last)):
            pass

    return lambda: run(side // 8), lambda: run(16), {"gflop": round(way.plan(side // 8, side // 8)[0].flops / 1e9, 1)}


def narrow_vae() -> Any:
    """The SDXL autoencoder's architecture at a quarter of its width, random weights."""
    import torch

    from hires._imports import quiet_imports

    with quiet_imports():
        from diffusers import AutoencoderKL
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=1024,
    ).eval().requires_grad_(False)  # fmt: skip


def host(side: int) -> Runs:
    """Float32 latents of the whole canvas, a small autoencoder band by band, every band into a PNG."""
    import torch

    from hires._imports import quiet_imports
    from hires.images.sinks import ImageSink
    from hires.kernels.blend import to_integers
    from hires.tiling.geometry import Size
    from hires.tiling.halo import HaloVAE

    with quiet_imports():
        from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).eval()  # fmt: skip
    way = HaloVAE(tiny, band_px=64)
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))

    def run(cells: int) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            ImageSink.open(Path(folder) / "a.png", Size(8 * cells, 8 * cells)) as sink,
        ):
            for band in way.decode_bands(z[..., :cells, :cells]):
                sink.write(to_integers(band[0], 8).numpy())

    return lambda: run(side // 8), lambda: run(16), {}


def exponent(pixels: Sequence[float], values: Sequence[float]) -> float:
    """b of values = a pixels^b, least squares in logarithms; nan below two points."""
    if len(pixels) < 2:
        return float("nan")
    return float(np.polyfit(np.log(pixels), np.log(np.maximum(values, 1e-9)), 1)[0])


def fits(rows: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """Per part: exponents of seconds, of seconds without attention, of its peak and of the process's; attention's shares."""
    found: dict[str, Row] = {}
    for part in PARTS:
        ran = [row for row in rows if row["part"] == part and row[STATE] == "ran"]
        pixels = [float(row["side"]) ** 2 for row in ran]
        seconds, attention, peak, process = (
            [float(row[name]) for row in ran] for name in ("p50_s", "attention_s", "peak_mib", "process_mib")
        )
        rest = [s - a for s, a in zip(seconds, attention, strict=True)]
        shares = [a / s for a, s in zip(attention, seconds, strict=True)]
        found[part] = {
            "sides": [int(row["side"]) for row in ran],
            "seconds": exponent(pixels, seconds),
            "seconds_without_attention": exponent(pixels, rest),
            "peak": exponent(pixels, peak),
            "process": exponent(pixels, process),
            "attention_share": [round(share, 3) for share in shares],
        }
    return {part: fit for part, fit in found.items() if len(fit["sides"]) > 1}


def kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Seconds without attention and peak grow as pixels at most, the host's memory more slowly; it takes two sizes to tell."""
    found = fits(rows)
    verdict = {f"{part}: two sizes ran": False for part in dict.fromkeys(str(row["part"]) for row in rows) if part not in found}
    for part, fit in found.items():
        if part == "host":
            verdict[f"host: memory exponent {fit['peak']:.2f} <= {HOST}"] = fit["peak"] <= HOST
            continue
        for name in ("seconds_without_attention", "peak"):
            verdict[f"{part}: {name} exponent {fit[name]:.2f} <= {LINEAR}"] = fit[name] <= LINEAR
    return verdict


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: seconds and bytes per side, then the exponents."""
    sides = sorted({int(row["side"]) for row in rows})
    lines = [f"| | {' | '.join(f'{side}²' for side in sides)} | exponent | without attention | attention's share |"]
    lines.append("|---" * (len(sides) + 4) + "|")
    found = fits(rows)
    at = {(str(row["part"]), int(row["side"])): row for row in rows}
    for part, fit in found.items():
        share = f"{fit['attention_share'][0]:.1%} to {fit['attention_share'][-1]:.1%}"
        numbers = [_cell(at.get((part, side)), "p50_s", ".2f") for side in sides]
        rest = f"{fit['seconds_without_attention']:.2f} | {share if fit['attention_share'][-1] else ''}"
        lines.append(f"| {part}, s | {' | '.join(numbers)} | {fit['seconds']:.2f} | {rest} |")
        numbers = [_cell(at.get((part, side)), "peak_mib", ".0f") for side in sides]
        lines.append(f"| {part}, MiB | {' | '.join(numbers)} | {fit['peak']:.2f} | | |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None, name: str, digits: str) -> str:
    if row is None:
        return ""
    return f"{float(row[name]):{digits}}" if row[STATE] == "ran" else str(row[STATE])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sides", default=",".join(map(str, SIDES)))
    parser.add_argument("--parts", default="", help=f"between semicolons, of: {'; '.join(PARTS)}")
    parser.add_argument("--threads", type=int, help="of torch; default: one for each core, with --quick one")
    parser.add_argument("--quick", action="store_true", help="two small sizes, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "scaling.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, measured)
    sides = [256, 512] if args.quick else sides_of(parser, args.sides)
    parts = [name.strip() for name in args.parts.split(";") if name.strip()] or list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or any(side % 64 or side < 256 for side in sides):
        parser.error(
            f"--parts {unknown}: of {'; '.join(PARTS)}" if unknown else f"--sides {args.sides}: multiples of 64 from 256"
        )
    cases = [{"part": part, "side": str(side)} for part in parts for side in sides if side <= PARTS[part]]
    threads = args.threads or (1 if args.quick else os.cpu_count() or 1)
    rows = newest(carried_out(SUITE, cases, None if args.quick else args.csv, threads, measured), SUITE.key)
    print(table(rows), file=sys.stderr)
    verdict = {} if args.quick else kept(rows)
    print(json.dumps({"suite": "scaling", "rows": rows, "exponents": fits(rows), "limits": verdict}))
    return 0 if all(verdict.values()) else 1
