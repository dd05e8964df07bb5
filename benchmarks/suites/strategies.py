"""Every strategy on a model with a known answer, and on the shipped one: duplicates, seams, drift, detail, cost.

    python -m benchmarks strategies                              # the oracle at 4x, 24 seeds
    python -m benchmarks strategies --model scenes --sides 1024,2048 --seeds 4 --pictures runs/strategies
    python -m benchmarks strategies --model scenes --sides 4096 --seeds 1 --only "spot,relay,relay + guidance,npa"
    python -m benchmarks strategies --table --figure docs/strategies.jpg --pictures runs/strategies

One row per model, strategy, size and relay sigma is appended to results/strategies.csv; rows that are there for the same code
and settings are kept. The last line of stdout is one JSON document with the rows and what the oracle's must keep; the exit
code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.common import RESULTS, append_row, code_of_pictures, digest, file_of, read_rows, stamp
from benchmarks.demo.held_out import held_out_scenes
from benchmarks.outcome import Outcome, on_oracle, on_scene
from benchmarks.recipes import ATTENTION, RECIPES, Work, base
from benchmarks.report.sheet import draw_sheet, picture_name
from benchmarks.subjects import OracleSubject, SceneSubject
from hires.devices.memory import peak_resident_bytes, reset_resident_peak
from hires.images.whole import to_uint8
from hires.tiling.geometry import Size

KEY = ("model", "strategy", "side", "relay_sigma")
HELD = ("relay", "relay + guidance", "npa", "npa + guidance")  # to which a relay sigma matters
COLUMNS = {
    "duplicates": "duplicates",
    "subject_kept": "subject kept",
    "seam_ratio": "seam ratio",
    "seam_score": "seam score",
    "drift": "drift",
    "detail": "added detail",
    "windows": "windows",
    "gflop": "GFLOP",
    "seconds_p50": "s (p50)",
}


def settings_digest() -> str:
    """Changes with the code and the weights that strategies and measures are made of."""
    own = (file_of(name) for name in ("oracle", "recipes", "subjects", "outcome", "scenes"))
    return digest([*code_of_pictures(), *own])


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row to be: `side` in cells of the oracle, in pixels of the scenes; `sigma` None for the model's own relay."""

    model: str
    strategy: str
    side: int
    sigma: float | None = None
    pictures: Path | None = None


def measured(case: Case, seed: int) -> tuple[Outcome, dict[str, float], float]:
    """One run: its outcome, its cost, and the relay sigma it had. The picture of a scene is kept in `pictures`."""
    model, side, sigma = case.model, case.side, case.sigma
    scene = held_out_scenes(seed + 1)[seed] if model == "scenes" else None
    subject: OracleSubject | SceneSubject
    if scene is None:
        subject, canvas = OracleSubject(relay_sigma=sigma or 1.0), Size(side, side)
    else:
        subject = SceneSubject(scene, Size(side, side), sigma)
        canvas = Size(side, side).divided(subject.spec.cell_px)
    work = Work()
    key = seed if scene is None else scene.seed
    with torch.inference_mode():
        begun = time.perf_counter()
        latents, grid = RECIPES[case.strategy](subject, canvas, key, work)
        seconds = time.perf_counter() - begun
        first, _ = base(subject, canvas, key, Work())
        if isinstance(subject, OracleSubject):
            found = on_oracle(latents, first, grid, subject.oracle)
        else:
            assert scene is not None
            picture = subject.picture(latents)
            found = on_scene(picture, subject.picture(first), grid, scene)
            keep(picture, case, sigma_of(case, subject.relay_sigma), seed)
    return found, {"windows": work.windows, "gflop": work.flops / 1e9, "seconds": seconds}, subject.relay_sigma


def sigma_of(case: Case, sigma: float) -> str:
    """A relay's sigma as its row has it; nothing for strategies without a relay."""
    return str(round(sigma, 3)) if case.strategy in HELD else ""


def keep(picture: torch.Tensor, case: Case, sigma: str, seed: int) -> None:
    """A scene's picture (3, H, W) as a file, where a folder was given."""
    if case.pictures is not None:
        case.pictures.mkdir(parents=True, exist_ok=True)
        name = picture_name(case.strategy, case.side, sigma, seed)
        Image.fromarray(to_uint8(picture.permute(1, 2, 0).numpy())).save(case.pictures / name)


def measured_row(case: Case, seeds: int) -> dict[str, object]:
    """The row of a strategy: means over seeds, the most duplicates of any, seconds by quantile."""
    reset_resident_peak()
    runs = [measured(case, seed) for seed in range(seeds)]
    outcomes, costs = [run[0] for run in runs], [run[1] for run in runs]
    p20, p50, p80 = (float(q) for q in np.quantile([cost["seconds"] for cost in costs], (0.2, 0.5, 0.8)))
    facts = {
        "model": case.model,
        "strategy": case.strategy,
        "side": case.side,
        "relay_sigma": sigma_of(case, runs[0][2]),
        "seeds": seeds,
        "duplicates": round(float(np.mean([o.duplicates for o in outcomes])), 3),
        "duplicates_max": max(o.duplicates for o in outcomes),
        "subject_kept": round(float(np.mean([o.kept for o in outcomes])), 3),
    }
    for name in ("seam_ratio", "seam_score", "drift", "detail"):
        facts[name] = round(float(np.mean([getattr(o, name) for o in outcomes])), 3)
    facts |= {name: round(float(np.mean([cost[name] for cost in costs])), 1) for name in ("windows", "gflop")}
    facts |= {"seconds_p20": round(p20, 3), "seconds_p50": round(p50, 3), "seconds_p80": round(p80, 3)}
    return facts | {"threads": torch.get_num_threads(), "peak_rss_gib": round(peak_resident_bytes() / 2**30, 2)}


def cases(model: str, strategies: Sequence[str], sides: Sequence[int], sigmas: Sequence[float]) -> Iterator[Case]:
    """Every row wanted; a strategy without a relay has one, whatever the sigmas."""
    for side in sides:
        for strategy in strategies:
            for sigma in sigmas if strategy in HELD and sigmas else [None]:
                yield Case(model=model, strategy=strategy, side=side, sigma=sigma)


def run(wanted: Iterable[Case], seeds: int, csv: Path) -> None:
    """Measure what is missing and append it. A relay of the model's own sigma is measured anew: only the run knows it."""
    key = settings_digest()
    for case in wanted:
        there = {(r["settings"], *(r[k] for k in KEY), r["seeds"]) for r in read_rows(csv)}
        own = case.sigma is None and case.strategy in HELD
        sigma = None if own else sigma_of(case, case.sigma or 0.0)
        if (key, case.model, case.strategy, str(case.side), sigma, str(seeds)) in there:
            continue
        row = measured_row(case, seeds)
        append_row(csv, stamp() | {"settings": key} | row)
        print(row, file=sys.stderr, flush=True)


def newest(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The last row of every key, by model and side, in the order of the recipes."""
    last = {tuple(row[k] for k in KEY): row for row in rows}
    order = list(RECIPES)
    return sorted(last.values(), key=lambda r: (r["model"], int(r["side"]), order.index(r["strategy"]), r["relay_sigma"]))


def limits(rows: Sequence[dict[str, str]]) -> dict[str, bool]:
    """What the oracle's rows at 4x must keep; a promise whose row is missing is not in it."""
    verdict = {}
    for row in (r for r in rows if r["model"] == "oracle" and int(r["side"]) == 256):
        duplicates, seam, drift = (float(row[name]) for name in ("duplicates", "seam_ratio", "drift"))
        name = f"{row['strategy']} {row['relay_sigma']}".strip()
        if row["strategy"].startswith("multidiffusion"):
            verdict[f"{name}: duplicates >= 8"] = duplicates >= 8
        if row["strategy"] == "relay + guidance":
            verdict[f"{name}: duplicates <= 0.2"] = duplicates <= 0.2
            verdict[f"{name}: seam ratio within 0.02 of 1"] = abs(seam - 1) <= 0.02
            verdict[f"{name}: drift <= 0.4"] = drift <= 0.4
    return verdict


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown, one table per model and size."""
    lines: list[str] = []
    for model, side in dict.fromkeys((r["model"], r["side"]) for r in rows):
        part = [r for r in rows if (r["model"], r["side"]) == (model, side)]
        what = f"{int(side) / 64:g} times its window" if model == "oracle" else f"{side} x {side} px"
        seeds = "seeds" if model == "oracle" else "captions"
        lines += [f"{model}, {what}, {part[0]['seeds']} {seeds}", "", f"| strategy | {' | '.join(COLUMNS.values())} |"]
        lines += ["|---" * (len(COLUMNS) + 1) + "|"]
        for row in part:
            name = row["strategy"] + (f" from sigma {float(row['relay_sigma']):g}" if row["relay_sigma"] else "")
            lines.append(f"| {name} | {' | '.join(f'{float(row[c]):.4g}' for c in COLUMNS)} |")
        lines.append("")
    return "\n".join(lines)


def numbers(text: str) -> list[float]:
    """'256,512' as numbers."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise SystemExit(f"{text!r}: give numbers between commas, such as 256,512") from None


def chosen(text: str, model: str) -> list[str]:
    """The recipes named between commas, or all that the model can run."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in RECIPES:
            raise SystemExit(f"--only {name!r}: give some of {', '.join(RECIPES)}")
    able = [name for name in RECIPES if name != "base" and (model == "scenes" or name not in ATTENTION)]
    refused = [name for name in names if name not in (*able, "base")]
    if refused:
        raise SystemExit(f"--only {', '.join(refused)}: the oracle has no attention; give --model scenes")
    return names or able


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks strategies", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=("oracle", "scenes"), default="oracle")
    parser.add_argument("--sides", help="canvas sides: cells of the oracle (its window is 64), pixels of the scenes")
    parser.add_argument("--seeds", type=int, help="runs per row; default 24 of the oracle, 2 of the scenes")
    parser.add_argument("--sigmas", help="where relays begin; default 1,3 of the oracle, the model's own of the scenes")
    parser.add_argument("--only", default="", help=f"strategies between commas, of: {', '.join(RECIPES)}")
    parser.add_argument("--quick", action="store_true", help="2 seeds of the oracle at 3x, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "strategies.csv")
    parser.add_argument("--pictures", type=Path, help="a folder that keeps the scenes' pictures, for the figure")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the newest rows as markdown")
    parser.add_argument("--figure", type=Path, help="draw every strategy's picture of seed 0, and scenes' from --pictures")
    args = parser.parse_args(argv)
    oracle = args.model == "oracle"
    sigmas = numbers(args.sigmas or ("1,3" if oracle else ""))
    names = chosen(args.only, args.model)
    if args.quick:
        small = cases("oracle", chosen("", "oracle"), [192], sigmas[:1])
        rows = [{k: str(v) for k, v in measured_row(case, 2).items()} for case in small]
        print(table(rows))
        print(json.dumps({"suite": "strategies", "rows": rows, "limits": {}}))
        return 0
    if not args.table and not args.figure:
        sides = [int(side) for side in numbers(args.sides or ("256" if oracle else "1024"))]
        wanted = (replace(case, pictures=args.pictures) for case in cases(args.model, names, sides, sigmas))
        run(wanted, args.seeds or (24 if oracle else 2), args.csv)
    rows = newest(read_rows(args.csv))
    if args.figure:
        draw_sheet(args.figure, sigmas, rows, args.pictures)
    print(table(rows))
    verdict = limits(rows)
    print(json.dumps({"suite": "strategies", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
