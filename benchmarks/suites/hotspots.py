"""Where the time of a render goes: the costliest operators of the shipped model's picture, each beside its floor.

    python -m benchmarks hotspots             # 2048 px, a minute and a half on two cores
    python -m benchmarks hotspots --quick     # 320 px, into no file

The first steps of every stage and the first bands are recorded, as `hires render --profile` does; a row is an operator on one
shape, with its share of what was recorded. The floor is the larger of its FLOPs over the measured peak and its bytes over a
copy's rate; of all convolutions and matrix products together, over the median of peaks before and after the render, as the
speed of a shared machine changes. The last line of stdout is one JSON document; the exit code is 1 where an operator is faster
than its floor, or all products are below 60 % of the peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import hires
from benchmarks.common import RESULTS, append_row, stamp
from benchmarks.demo.held_out import held_out_scenes
from benchmarks.peaks import peaks
from hires.bench.profile import Costly, Profile
from hires.bench.timing import peak_flops

ROWS = 10
PRODUCTS = ("aten::mkldnn_convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
SHARE_OF_PEAK = 0.6  # that convolutions and matrix products together reach at least
FASTER = 0.8  # than its floor: the peaks are measured too, and vary


def costliest(side: int) -> tuple[list[Costly], float]:
    """Operators, costliest first, and what the peak that their floors are of is over the median of those around the render."""
    scene, around = held_out_scenes(1)[0], peaks()
    with tempfile.TemporaryDirectory() as folder:
        with Profile(Path(folder) / "trace.json") as profile:
            result = hires.render(scene.caption, size=(side, side), seed=scene.seed, device="cpu", on_event=profile.hear)
        profile.report(result.plan)
    usual = statistics.median([*around, *peaks()])
    return profile.costly, peak_flops(torch.device("cpu"), torch.float32) / usual


def rows_at(side: int) -> list[dict[str, Any]]:
    """A row for each of the costliest, and one for all convolutions and matrix products together."""
    found, above = costliest(side)
    whole = sum(one.seconds for one in found)
    products = [one for one in found if one.name in PRODUCTS and one.floor_seconds]
    together = Costly(
        name="all convolutions and matrix products", shapes="", calls=sum(one.calls for one in products),
        seconds=sum(one.seconds for one in products), floor_seconds=above * sum(one.floor_seconds or 0.0 for one in products),
    )  # fmt: skip
    return [
        {
            "side": side,
            "place": place,
            "operator": one.name,
            "shapes": one.shapes,
            "calls": one.calls,
            "seconds": round(one.seconds, 4),
            "share": round(one.seconds / whole, 4),
            "floor_s": "" if one.floor_seconds is None else round(one.floor_seconds, 4),
            "over_floor": "" if not one.floor_seconds else round(one.seconds / one.floor_seconds, 2),
        }
        for place, one in enumerate([*found[:ROWS], together], 1)
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks hotspots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="320 px, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "hotspots.csv")
    args = parser.parse_args(argv)
    if args.side < 256:
        parser.error(f"--side {args.side}: give 256 or more")
    rows = [stamp() | row for row in rows_at(320 if args.quick else args.side)]
    for row in rows:
        what = f"{row['operator']:<34} {row['shapes'][:50]:<52}"
        print(f"{what}{row['seconds']:>9} s {row['share']:>7.1%} {row['over_floor']:>7} x floor", file=sys.stderr)
        if not args.quick:
            append_row(args.csv, row)
    verdict = {} if args.quick else {f"{r['operator']} {r['shapes']}: not below its floor": r["over_floor"] >= FASTER
                                     for r in rows if r["over_floor"]}  # fmt: skip
    if not args.quick:
        share = 1 / float(rows[-1]["over_floor"])
        verdict[f"{rows[-1]['operator']}: {share:.0%} of the peak, at least {SHARE_OF_PEAK:.0%}"] = share >= SHARE_OF_PEAK
    print(json.dumps({"suite": "hotspots", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
