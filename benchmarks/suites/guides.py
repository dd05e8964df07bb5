"""Which low-pass and which ramp hold a relay best: structure guidance on the oracle at 4x, from a sigma that forgets.

    python -m benchmarks guides                   # 24 seeds, from sigma 3

Rows go to results/guides.csv, `none` first. The last line of stdout is one JSON document; the exit code is 1 where a guide
holds the picture less than none does.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import RESULTS, append_row, stamp
from benchmarks.disks import quiet_energy
from benchmarks.oracle import find_objects
from benchmarks.outcome import averaged, drift, prior_energy
from benchmarks.recipes import Hold, Work, base, relay
from benchmarks.subjects import OracleSubject
from hires.metrics.seams import seam_lines, seam_ratio
from hires.protocols import LowPass
from hires.refine.low_pass import Area, Fourier, Wavelet
from hires.refine.structure import Strength, constant, power_ramp, variance_ramp
from hires.tiling.geometry import Size

LOW_PASSES: dict[str, Callable[[float], LowPass]] = {
    "area": Area,
    "area of half": lambda factor: Area(2 * factor),
    "fourier": lambda factor: Fourier(0.5 / factor),
    "fourier of half": lambda factor: Fourier(0.25 / factor),
    "butterworth 0.8 order 4": lambda factor: Fourier(0.4 / factor, 4),
    "haar": lambda factor: Wavelet(round(np.log2(factor)), 1),
    "db4": lambda factor: Wavelet(round(np.log2(factor)), 4),
}
RAMPS: dict[str, Callable[[float], Strength]] = {
    "sigma": power_ramp,
    "sigma^1/2": lambda start: power_ramp(start, 0.5),
    "variance": variance_ramp,
    "always": lambda start: constant(1.0),
}


def measured(hold: Hold | None, sigma: float, seeds: int, side: int) -> dict[str, float]:
    """Means over seeds."""
    subject, canvas, found = OracleSubject(relay_sigma=sigma), Size(side, side), []
    for seed in range(seeds):
        first, _ = base(subject, canvas, seed, Work())
        latents, grid = relay(hold=hold)(subject, canvas, seed, Work())
        picture, pixels = latents[0, 0], latents[0, 0].numpy()
        energy = quiet_energy(pixels, 0.5 * subject.native / side) / prior_energy(
            subject.oracle, picture, 0.5 * subject.native / side
        )
        off = drift(averaged(picture, first.shape[-2:]), first[0, 0])
        found.append((len(find_objects(picture, subject.oracle)), seam_ratio(pixels, *seam_lines(grid, 1)), off, energy))
    return dict(zip(("duplicates", "seam_ratio", "drift", "detail"), np.mean(found, axis=0).round(3).tolist(), strict=True))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks guides", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--sigma", type=float, default=3.0, help="where the relay begins")
    parser.add_argument("--side", type=int, default=256, help="cells of the canvas; the window is 64")
    parser.add_argument("--csv", type=Path, default=RESULTS / "guides.csv")
    args = parser.parse_args(argv)
    rows = []
    pairs = [("none", "none"), *itertools.product(LOW_PASSES, RAMPS)]
    for low_pass, ramp in pairs:
        hold = None if low_pass == "none" else Hold(LOW_PASSES[low_pass], RAMPS[ramp])
        facts = {"low_pass": low_pass, "ramp": ramp, "side": args.side, "relay_sigma": args.sigma, "seeds": args.seeds}
        with torch.inference_mode():
            row = stamp() | facts | measured(hold, args.sigma, args.seeds, args.side)
        append_row(args.csv, row)
        rows.append(row)
    print("| low-pass | ramp | duplicates | seam ratio | drift | detail |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(str(row[c]) for c in ('low_pass', 'ramp', 'duplicates', 'seam_ratio', 'drift', 'detail'))} |")
    print(json.dumps({"suite": "guides", "rows": rows}))
    return 0 if all(float(row["drift"]) <= float(rows[0]["drift"]) for row in rows) else 1
