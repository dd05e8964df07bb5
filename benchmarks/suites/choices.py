"""How much a choice changes the picture: the README's caption at 768x512 by the shipped model, against the default.

    python -m benchmarks choices              # two minutes on two cores
    python -m benchmarks choices --quick      # 512x384 and few steps, into no file

A row has the largest difference in 8-bit values and the PSNR. The last line of stdout is one JSON document; the exit code is 1
where another budget changes the picture by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hires
from benchmarks.common import EQUAL_DB, RESULTS, append_row, stamp
from hires.metrics.fidelity import psnr

CAPTION = "a moon on the left over purple mountains and a lake at night"
SEED = 7
ROUNDING = 1  # of an 8-bit value
BUDGET = "another budget, batch or decode (`--vram 60MB`)"
CHOICES: dict[str, dict[str, Any]] = {
    BUDGET: {"vram": "60MB"},
    "bf16 instead of float32": {"dtype": "bf16"},
    "`--overlap 128`": {"overlap_px": 128},
    "`--tile 384`": {"tile_px": 384},
    "tiles that move at every step": {"relay": "tile=256,overlap=64,move=yes"},
    "`--attention-policy npa`": {"attention_policy": "npa"},
    "`--attention-policy kvpool:2`": {"attention_policy": "kvpool:2"},
    "`--relay guide=none`": {"relay": "guide=none"},
    "`--relay sampler=euler_ancestral,enlarger=pixel`": {"relay": "sampler=euler_ancestral,enlarger=pixel"},
    "`--preset fast`": {"preset": "fast"},
    "`--preset best`": {"preset": "best"},
}


def measured(size: str, names: Sequence[str], **more: Any) -> Iterator[dict[str, Any]]:
    """A row for every choice named, each drawn with the same seed."""
    options: dict[str, Any] = {"size": size, "seed": SEED, "device": "cpu"} | more
    usual = hires.render(CAPTION, **options).pixels.astype(np.int32)
    for name in names:
        found = hires.render(CAPTION, **(options | CHOICES[name])).pixels.astype(np.int32)
        decibels = psnr(found.astype(np.float32), usual.astype(np.float32), 255.0)
        yield {
            "choice": name,
            "size": size,
            "largest": int(np.abs(found - usual).max()),
            "psnr_db": round(min(decibels, EQUAL_DB), 1),
        }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks choices", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two choices on a small picture, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "choices.csv")
    args = parser.parse_args(argv)
    rows = []
    wanted = (
        measured("512x384", (BUDGET, "`--relay guide=none`"), steps=2) if args.quick else measured("768x512", tuple(CHOICES))
    )
    for row in wanted:
        print(f"{row['choice']}: {row['largest']}, {row['psnr_db']} dB", file=sys.stderr, flush=True)
        rows.append(stamp() | row)
        if not args.quick:
            append_row(args.csv, rows[-1])
    kept = {
        "another budget is the same to rounding": all(row["largest"] <= ROUNDING for row in rows if row["choice"] == BUDGET)
    }
    print(json.dumps({"suite": "choices", "rows": rows, "limits": kept}))
    return 0 if all(kept.values()) else 1
