"""`python -m benchmarks presets`: what every preset costs at 2K, 4K and 8K, planned and counted on tensors that hold nothing.

A row is a family, a preset and a size: PFLOP as `hires plan` says, and counted by running each network of each stage and the
autoencoder once at their full size on fake tensors, times the evaluations of the plan. The text towers are left out of both.
"""

from __future__ import annotations

import argparse
import itertools
import json
from typing import Any

from benchmarks.common import RESULTS, append_row, read_rows, stamp
from benchmarks.full_size import full_spec, network_flops, vae_flops
from hires.devices.machines import described_card
from hires.options.render import PRESETS, RenderRequest
from hires.planning.costs.evaluations import estimates
from hires.planning.plan import MemoryPlan
from hires.planning.planner import plan
from hires.tiling.geometry import Size
from hires.units import parse_bytes

FAMILIES = ("cosxl", "pixart-sigma-1024", "pixart-sigma-2k")
SIDES = (2048, 4096, 8192)
LIMITS = {
    ("cosxl", "balanced", 4096): 3.4,
    ("cosxl", "balanced", 8192): 14.5,
    ("cosxl", "fast", 4096): 1.5,
    ("pixart-sigma-1024", "balanced", 4096): 4.5,
    ("pixart-sigma-2k", "balanced", 4096): 4.5,
}
AGREE = 0.02  # how far a plan may be from what was counted
KEY = ("family", "preset", "side")


def planned(family: str, preset: str, side: int) -> MemoryPlan:
    """The plan for a card of 24 GB."""
    request = RenderRequest(prompt="", size=Size(side, side), preset=preset)
    return plan(request, full_spec(family), described_card(parse_bytes("24GB")))


def counted(family: str, made: MemoryPlan) -> float:
    """FLOPs of a whole render: every estimate of every stage, the way through pixels between them, the last decode."""
    spec, total = full_spec(family), 0.0
    for index, stage in enumerate(made.stages):
        total += sum(estimates(stage, spec)) * stage.grid.count * network_flops(family, stage.grid.tile, stage.attention)
        if stage.enlarger != "latent" and index:
            total += vae_flops(made.stages[index - 1].grid.canvas, made.decode, False)
            total += vae_flops(stage.grid.canvas, made.decode, True)
    return total + vae_flops(made.stages[-1].grid.canvas, made.decode, False)


def row_of(family: str, preset: str, side: int) -> dict[str, Any]:
    made = planned(family, preset, side)
    text = next(cost for cost in made.costs if cost.stage == "text")
    found, said = counted(family, made), made.flops - text.flops
    limit = LIMITS.get((family, preset, side))
    return {
        "family": family, "preset": preset, "side": side,
        "stages": " + ".join(f"{len(estimates(s, full_spec(family)))} at {s.canvas.width}" for s in made.stages),
        "planned_pflop": round(said / 1e15, 4), "counted_pflop": round(found / 1e15, 4),
        "limit_pflop": "" if limit is None else limit,
        "within": (limit is None or found <= limit * 1e15) and abs(said / found - 1) <= AGREE,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks presets", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="balanced CosXL at 2K alone, no rows")
    parser.add_argument("--csv", action="store_true", help="append rows to benchmarks/results/presets.csv")
    options = parser.parse_args(arguments)
    path, rows = RESULTS / "presets.csv", []
    cases = [("cosxl", "balanced", 2048)] if options.quick else list(itertools.product(FAMILIES, PRESETS, SIDES))
    done = {tuple(row[name] for name in KEY) for row in read_rows(path)} if options.csv else set()
    for case in cases:
        if tuple(map(str, case)) in done:
            continue
        row = row_of(*case)
        rows.append(row)
        limit = f", at most {row['limit_pflop']}" if row["limit_pflop"] else ""
        print(f"{case[0]:<18}{case[1]:<9}{case[2]:>5} px {row['counted_pflop']:>8.3f} PFLOP counted{limit}, "
              f"{row['planned_pflop']:.3f} planned: {row['stages']}", flush=True)  # fmt: skip
        if options.csv:
            append_row(path, stamp() | row)
    wrong = [row for row in rows if not row["within"]]
    print(json.dumps({"suite": "presets", "rows": rows, "outside": wrong}))
    return 1 if wrong else 0
