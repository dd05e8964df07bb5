"""One render from naive to ours, one change at a time: seconds, memory and quality of every step, and what the step was worth.

    python -m benchmarks waterfall                 # 2048 px; a row is stopped at ten minutes
    python -m benchmarks waterfall --quick         # some rows at 320 px with few sampler steps, into no file

A held-out caption by the shipped model. Every row is a process of its own; rows that results/waterfall.csv has for the same
code are kept. Pictures lie in runs/waterfall. The last line of stdout is one JSON document; the exit code is 1 where ours is
not the fastest by default, to a tenth, or a step that promises the same picture draws another one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import EQUAL_DB, RESULTS, decibels
from benchmarks.rows import STATE, Row, Suite, carried_out, child, in_child

SUITE = Suite(
    name="waterfall",
    key=("side", "step"),
    columns=(
        "seconds", "denoise_s", "decode_s", "write_s", "peak_rss_gib", "tflop", "gflop_per_s", "share_of_peak",
        "disks", "right_third", "seam_score", "texture_over_truth", "psnr_to_ours_db", "file_mb",
    ),
    code=("bench_waterfall", "bench_scenes", "scenes", "held_out", "peaks"),
)  # fmt: skip
PICTURES = Path("runs/waterfall")
STOPPED = f"over {SUITE.limit_s:g} s"
SHOWN = {"tflop": 1, "share_of_peak": 2, "peak_rss_gib": 2, "disks": 0, "seam_score": 2, "texture_over_truth": 2}
SAME_DB = 50.0
AGAIN = 1.1  # what a second run of a row differs by, on a machine that is shared: 47.3 to 51.8 s in three
QUICK = (0, 1, 2, 6, 9, 10)  # the steps that go by other code
QUICK_STEPS = 4  # of the sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a render runs. `overlap_px`: of the tiles; `backend`: of attention, None for the dispatch's own; `batch`: pictures at
    once, None for the plan's; `kept`: freed memory stays the process's; `same`: the picture is ours, to rounding; `dtype`: the
    network's; `asked`: no default, so it may be the fastest."""

    name: str
    strategy: str
    overlap_px: int | None = None
    blend: str | None = None
    backend: str | None = None
    channels_last: bool = True
    batch: int | None = None
    whole_decode: bool = False
    kept: bool = True
    streamed: bool = True
    same: bool = False
    dtype: str = "auto"
    asked: bool = False


OURS = Step(name="rows into the file as they come", strategy="progressive", same=True)
BF16 = replace(OURS, name="--dtype bf16, where asked for", dtype="bf16", asked=True)


def steps() -> tuple[Step, ...]:
    """From naive to ours, each one change away from the one before, and what ours takes in another type."""
    whole_file = replace(OURS, name="freed memory is kept", streamed=False)
    fresh = replace(whole_file, name="decode in bands", kept=False)
    whole_decode = replace(fresh, name="eight pictures at once", whole_decode=True)
    single = replace(whole_decode, name="channels-last maps", batch=1)
    planes = replace(single, name="fused attention", channels_last=False)
    scores = replace(planes, name="tiles share a quarter", backend="math")
    half = replace(scores, name="a base picture, enlarged and refined", overlap_px=128, same=False)
    windows = replace(half, name="windows that share half, from noise", strategy="tiled", blend="box")
    canvas = replace(windows, name="the whole canvas, from noise", strategy="direct", overlap_px=None, blend=None)
    return (canvas, windows, half, scores, planes, single, whole_decode, fresh, whole_file, OURS, BF16)


def measured(case: Mapping[str, str]) -> Row:
    """One render by one step, in this process."""
    import numpy as np
    import torch
    from PIL import Image

    from benchmarks.demo.held_out import held_out_scenes
    from benchmarks.peaks import peaks
    from hires.devices.memory import peak_resident_bytes, reset_resident_peak
    from hires.metrics.fidelity import psnr

    step = next(step for step in steps() if step.name == case["step"])
    scene, side = held_out_scenes(1)[0], int(case["side"])
    path = Path(case["pictures"]) / f"{side}_{steps().index(step)}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if step.dtype == "bf16" else torch.float32
    times = 1 if "steps" in case else 3
    around = peaks(dtype, times)
    reset_resident_peak()
    with layout(step.channels_last):
        found, plan = drawn(step, picture_options(case), path)
    found["peak_rss_gib"] = round(peak_resident_bytes() / 2**30, 3)
    rate, peak = plan.flops / (found["denoise_s"] + found["decode_s"]), statistics.median([*around, *peaks(dtype, times)])
    picture = np.asarray(Image.open(path))
    ours = np.asarray(Image.open(reference(case)))
    return (
        found
        | quality(scene, picture, plan, base_picture(picture_options(case)))
        | {
            "tflop": round(plan.flops / 1e12, 3),
            "gflop_per_s": round(rate / 1e9, 1),
            "share_of_peak": round(rate / peak, 3),
            "psnr_to_ours_db": round(min(psnr(picture, ours, 255.0), EQUAL_DB), 1),
            "file_mb": round(path.stat().st_size / 1e6, 2),
        }
    )


@contextmanager
def layout(channels_last: bool) -> Iterator[None]:
    """Without channels-last, all that asks for that layout gets planes."""
    import torch

    if channels_last:
        yield
        return
    with mock.patch.object(torch, "channels_last", torch.contiguous_format):
        yield


def picture_options(case: Mapping[str, str]) -> dict[str, Any]:
    """What every step renders: caption, size, seed and, with --quick, how few sampler steps."""
    from benchmarks.demo.held_out import held_out_scenes
    from hires.tiling.geometry import Size

    scene, side = held_out_scenes(1)[0], int(case["side"])
    steps = int(case["steps"]) if "steps" in case else None
    return {"prompt": scene.caption, "size": Size(side, side), "seed": scene.seed, "steps": steps}


def drawn(step: Step, options: Mapping[str, Any], path: Path) -> tuple[Row, Any]:
    """The picture in its file, what it took by part, and the plan that ran."""
    import hires

    begun = time.perf_counter()
    if step in (OURS, BF16):
        size = (options["size"].height, options["size"].width)
        result = hires.render(
            **{**options, "size": size}, strategy=step.strategy, dtype=step.dtype, output=path, overwrite=True
        )
    else:
        result = planned(step, options)
    rendered = time.perf_counter()
    if result.path is None:
        from PIL import Image

        Image.fromarray(result.pixels).save(path)
    seconds, decode = time.perf_counter() - begun, result.stats[-1].seconds
    denoise = sum(stage.seconds for stage in result.stats[:-1])
    written = 0.0 if result.path else time.perf_counter() - rendered
    parts = {"seconds": seconds, "denoise_s": denoise, "decode_s": decode, "write_s": written}
    return {name: round(value, 2) for name, value in parts.items()}, result.plan


def planned(step: Step, options: Mapping[str, Any]) -> Any:
    """A render by the plan of a step, its pixels in memory."""
    import torch

    from hires.checkpoints.spec import load_spec
    from hires.devices import machines
    from hires.devices.memory import freed_pages
    from hires.engine.run import run_plan
    from hires.options.render import RenderRequest
    from hires.planning import planner
    from hires.planning.plan import DecodePlan

    policy = "global" if step.strategy == "direct" else None
    request = RenderRequest(
        **options, strategy=step.strategy, overlap_px=step.overlap_px, attention=step.backend, attention_policy=policy
    )
    made = planner.plan(request, load_spec("demo"), machines.host_device())
    stages = tuple(replace(stage, batch=step.batch or stage.batch, blend=step.blend or stage.blend) for stage in made.stages)
    decode = DecodePlan(policy="whole", band_rows=0, dtype=made.decode.dtype) if step.whole_decode else made.decode
    ladder = tuple(rung for rung in made.ladder if rung.stage != "decode")  # an out-of-memory is a result here
    made = replace(made, stages=stages, batch=step.batch or made.batch, decode=decode, ladder=ladder)
    with freed_pages("kept" if step.kept else "usual"):
        return run_plan(request, made, load_spec("demo"), torch.device("cpu"), lambda event: None)


def base_picture(options: Mapping[str, Any]) -> Any:
    """The shipped model's picture at the size that it was trained at, (256, 256, 3) uint8."""
    import hires

    return hires.render(**{**options, "size": "256x256"}).pixels


def quality(scene: Any, picture: Any, plan: Any, base: Any) -> Row:
    """Disks, seams and texture against the scene drawn at that size."""
    from benchmarks.suites.scenes import measure

    found = measure(scene, picture, plan, base)
    return {
        "disks": int(str(found["disks"])) + int(str(found["lopsided"])),
        "right_third": found["one_disk_right_third"],
        "seam_score": found["seam_over_control"],
        "texture_over_truth": found["texture_over_truth"],
    }


def reference(case: Mapping[str, str]) -> Path:
    """Where the picture of our own way lies."""
    return Path(case["pictures"]) / f"{case['side']}_{steps().index(OURS)}.png"


def cases(side: int, pictures: Path, only: Sequence[str], steps_taken: int | None = None) -> list[dict[str, str]]:
    """Ours first: the others are held against it. steps_taken: of the sampler, the model's own number by default."""
    always = {"side": str(side), "pictures": str(pictures)}
    if steps_taken:
        always["steps"] = str(steps_taken)
    chosen = [step.name for step in steps() if step == OURS or not only or step.name in only]
    return [always | {"step": name} for name in sorted(chosen, key=lambda name: name != OURS.name)]


def kept(rows: Sequence[Mapping[str, Any]], timed: bool = True) -> dict[str, bool]:
    """What a table must show: a step to the same picture draws it, and, where it is `timed`, ours is the fastest of those that
    end and that nobody has to ask for, but for what a second run differs by."""
    ran = {str(row["step"]): row for row in rows if row[STATE] == "ran"}
    verdict = {}
    if timed:
        ours = float(ran[OURS.name]["seconds"])
        asked = {step.name for step in steps() if step.asked}
        verdict["ours is the fastest"] = all(ours <= AGAIN * float(row["seconds"]) for n, row in ran.items() if n not in asked)
    for step in steps():
        if step.same and step.name in ran:
            verdict[f"{step.name}: PSNR >= {SAME_DB:g} dB"] = float(ran[step.name]["psnr_to_ours_db"]) >= SAME_DB
    return verdict


def in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    names = [step.name for step in steps()]
    return sorted((row for row in rows if row["step"] in names), key=lambda row: (int(row["side"]), names.index(row["step"])))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every step of the largest picture with what it is worth, at least, where the one before was stopped."""
    rows = [row for row in rows if int(row["side"]) == max(int(row["side"]) for row in rows)]
    lines = [
        "| | s | this step | in all | TFLOP | of peak | GiB | suns | seam | texture ÷ truth | PSNR to ours |",
        "|---" * 11 + "|",
    ]
    first = before = ("", 0.0)  # a sign where it is the least that the step would have taken, and seconds
    for row in in_order(rows):
        if row[STATE] != "ran":
            lines.append(f"| {row['step']} | {row[STATE]} |" + " |" * 9)
            before = ("> ", SUITE.limit_s) if row[STATE] == STOPPED else ("", 0.0)
            first = first if first[1] else before
            continue
        seconds, same = float(row["seconds"]), decibels(row["psnr_to_ours_db"])
        gains = [f"{sign}{earlier / seconds:.2f}×" if earlier else "" for sign, earlier in (before, first)]
        before = ("", seconds)
        first = first if first[1] else before
        numbers = [f"{float(row[name]):.{digits}f}" for name, digits in SHOWN.items()]
        lines.append(f"| {row['step']} | {seconds:.1f} | {' | '.join((*gains, *numbers, same))} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks waterfall", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--threads", type=int, help="of torch; default: one for each core, with --quick one")
    parser.add_argument("--only", default="", help=f"steps between semicolons, of: {'; '.join(s.name for s in steps())}")
    parser.add_argument("--quick", action="store_true", help="some steps at 320 px, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "waterfall.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, measured)
    threads = args.threads or (1 if args.quick else os.cpu_count() or 1)
    side, csv = (320, None) if args.quick else (args.side, args.csv)
    only = [steps()[i].name for i in QUICK] if args.quick else [n.strip() for n in args.only.split(";") if n.strip()]
    if set(only) - {step.name for step in steps()} or side < 256:
        parser.error(f"--only {args.only!r}: of {'; '.join(s.name for s in steps())}; --side {side}: from 256")
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) if args.quick else PICTURES / SUITE.settings()
        wanted = cases(side, pictures.absolute(), only, QUICK_STEPS if args.quick else None)
        if csv is not None and not reference(wanted[0]).exists():
            in_child(SUITE, wanted[0], threads)
        rows = in_order(carried_out(SUITE, wanted, csv, threads, measured))
    print(table(rows), file=sys.stderr)
    verdict = kept(rows, not args.quick)
    print(json.dumps({"suite": "waterfall", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
