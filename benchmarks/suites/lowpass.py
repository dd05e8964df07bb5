"""How long a low-pass of a picture's latents takes, and how near it is to what it promises.

    python -m benchmarks lowpass                  # the latents of 2048, 4096 and 8192 px, one thread

Rows go to results/lowpass.csv. `idempotence` is max |LP(LP(x)) - LP(x)| over the standard deviation of LP(x), x white noise: a
projector's is rounding. The last line of stdout is one JSON document; the exit code is 1 where a projector is none.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RESULTS, append_row, stamp
from hires.protocols import LowPass
from hires.refine.low_pass import Area, Fourier, Wavelet

KINDS: dict[str, tuple[LowPass, bool]] = {
    "area 8": (Area(8), False),
    "haar 3 levels": (Wavelet(3, 1), True),
    "db4 1 level": (Wavelet(1), True),
    "db4 3 levels": (Wavelet(3), True),
    "fourier 1/16": (Fourier(1 / 16), True),
    "butterworth 1/10, order 4": (Fourier(0.1, 4), False),
}
ROUNDING = 1e-4  # of a deviation of LP(x)


def measured(name: str, cells: int, repeats: int) -> dict[str, object]:
    """Seconds by quantile for (1, 4, cells, cells) float32, the first pass (which makes the matrices) apart."""
    low_pass, projector = KINDS[name]
    x = torch.randn(1, 4, cells, cells, generator=torch.Generator().manual_seed(cells))
    begun = time.perf_counter()
    low = low_pass(x)
    first, seconds = time.perf_counter() - begun, []
    for _ in range(repeats):
        begun = time.perf_counter()
        low_pass(x)
        seconds.append(time.perf_counter() - begun)
    p20, p50, p80 = (round(1e3 * float(q), 2) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    facts = {
        "low_pass": name,
        "cells": cells,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "first_ms": round(1e3 * first, 1),
    }
    error = float((low_pass(low) - low).abs().max() / low.std())
    return facts | {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "projector": int(projector), "idempotence": f"{error:.1e}"}


def kept(rows: Sequence[dict[str, object]]) -> bool:
    return all(float(str(row["idempotence"])) <= ROUNDING for row in rows if row["projector"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lowpass", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", default="256,512,1024", help="sides of the latents")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=RESULTS / "lowpass.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [stamp() | measured(name, int(cells), args.repeats) for cells in args.cells.split(",") for name in KINDS]
    for row in rows:
        append_row(args.csv, row)
    print(json.dumps({"suite": "lowpass", "rows": rows}))
    return 0 if kept(rows) else 1
