"""Where the time of a render goes: the costliest operators of the shipped model's picture, each beside its floor.

    python -m benchmarks hotspots             # 2048 px, half a minute on two cores
    python -m benchmarks hotspots --quick     # 320 px, into no file

The first steps of every stage and the first bands are recorded, as `hires render --profile` does; a row is an operator on one
shape, with its share of what was recorded. The floor is the larger of its FLOPs over the machine's measured peak and its bytes
over a copy's rate. The last line of stdout is one JSON document; the exit code is 1 where an operator is faster than its floor.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import hires
from benchmarks.common import RESULTS, append_row, stamp
from benchmarks.held_out import held_out_scenes
from hires.profiling import Costly, Profile

ROWS = 10
FASTER = 0.8  # than its floor: the peaks are measured too, and vary


def costliest(side: int) -> tuple[list[Costly], float]:
    """Operators, costliest first, and the seconds of all of them."""
    scene = held_out_scenes(1)[0]
    with tempfile.TemporaryDirectory() as folder:
        with Profile(Path(folder) / "trace.json") as profile:
            result = hires.render(scene.caption, size=(side, side), seed=scene.seed, device="cpu", on_event=profile.hear)
        profile.report(result.plan)
    return profile.costly, sum(one.seconds for one in profile.costly)


def rows_at(side: int) -> list[dict[str, Any]]:
    found, whole = costliest(side)
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
        for place, one in enumerate(found[:ROWS], 1)
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
    print(json.dumps({"suite": "hotspots", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
