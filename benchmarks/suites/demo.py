"""`make demo` beside an earlier version of this repository: the same command from both trees in turn, on the same machine.

    python -m benchmarks demo                      # beside the first version that drew, 2048 px; nine minutes on two cores
    python -m benchmarks demo --against COMMIT     # beside any other that this clone has
    python -m benchmarks demo --quick              # this tree alone at 256 px, into no file

The whole command is timed, with what Python needs to start; both trees run in this environment, each with its own weights.
`--dtype bf16` is a row of its own, where the CPU multiplies it. Rows that results/demo.csv has for the same code are kept;
pictures lie in runs/demo. The last line of stdout is one JSON document; the exit code is 1 where this tree is slower than the
other, or its picture in bf16 is below 50 dB of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import EQUAL_DB, RESULTS, decibels
from benchmarks.rows import ROOT, STATE, Row, Suite, carried_out, child
from hires.devices.machines import multiplies_bf16

SUITE = Suite(
    name="demo",
    key=("side", "against", "round", "version", "options"),
    columns=("seconds", "psnr_to_ours_db"),
    code=("bench_demo",),
)
PICTURES = Path("runs/demo")
FIRST = "fb5067ad07"  # the first version that drew
OURS, BF16 = "this tree", "--dtype bf16"
CAPTION = "a sun on the right over green mountains and a lake at dusk"
SAME_DB = 50.0
START = """import sys
sys.argv[0] = "hires"
try:
    from hires.cli.app import app
except ImportError:  # an earlier version
    from hires.cli import app
app()"""


def resolved(name: str) -> str:
    """A commit's own short name. ValueError where this clone has no such commit."""
    command = ["git", "rev-parse", "--short=10", "--verify", f"{name}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"--against {name!r}: this clone has no such commit")
    return found.stdout.strip()


def unpacked(commit: str, folder: Path) -> Path:
    """The tree of a commit, in a folder."""
    packed = folder / "tree.zip"
    subprocess.run(["git", "archive", "--format=zip", f"--output={packed}", commit], cwd=ROOT, check=True)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder / "tree")
    return folder / "tree"


def seconds(tree: Path, options: Sequence[str], side: int, picture: Path) -> float:
    """Of the whole command. RuntimeError with what it said where it fails."""
    command = [sys.executable, "-c", START, "render", CAPTION, "--size", f"{side}x{side}", "-o", str(picture), "--overwrite"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    begun = time.perf_counter()
    ended = subprocess.run([*command, *options], cwd=tree, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{tree}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return time.perf_counter() - begun


def measured(case: Mapping[str, str]) -> Row:
    """One render by one version: seconds, and its picture against ours, which is drawn first."""
    import numpy as np
    from PIL import Image

    from hires.metrics.fidelity import psnr

    pictures = Path(case["pictures"])
    pictures.mkdir(parents=True, exist_ok=True)
    ours, own = (pictures / f"{case['side']}_{name}.png" for name in (OURS, f"{case['version']}{case['options']}"))
    with tempfile.TemporaryDirectory() as scratch:
        tree = ROOT if case["version"] == OURS else unpacked(case["version"], Path(scratch))
        took = seconds(tree, case["options"].split(), int(case["side"]), own)
    same = psnr(np.asarray(Image.open(own)), np.asarray(Image.open(ours)), 255.0)
    return {"seconds": round(took, 1), "psnr_to_ours_db": round(min(same, EQUAL_DB), 1)}


def cases(side: int, against: str, rounds: int, pictures: Path) -> list[dict[str, str]]:
    """Ours, ours in bf16 and the other version in turn, as often as there are rounds."""
    ways = [(OURS, ""), *([(OURS, BF16)] if multiplies_bf16() else []), *([(against, "")] if against else [])]
    same = {"side": str(side), "against": against, "pictures": str(pictures)}
    return [same | {"round": str(n), "version": v, "options": o} for n in range(1, rounds + 1) for v, o in ways]


def medians(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Seconds by version and options, those that ran."""
    taken: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row[STATE] == "ran":
            taken.setdefault((row["version"], row["options"]), []).append(float(row["seconds"]))
    return {version: statistics.median(values) for version, values in taken.items()}


def kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Not slower than the other version; in bf16 the same picture."""
    took = medians(rows)
    ours = took[OURS, ""]
    others = {version: value for (version, _), value in took.items() if version != OURS}
    verdict = {f"{ours / other:.0%} of the seconds of {version}": ours <= other for version, other in others.items()}
    worst = min((float(row["psnr_to_ours_db"]) for row in rows if row["options"]), default=EQUAL_DB)
    return verdict | {f"{BF16}: PSNR >= {SAME_DB:g} dB": worst >= SAME_DB}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: for every version that ours was held against, the medians of all three and what they are of the other one's."""
    lines = ["| against | | s (p50) | least to most | of the other's | PSNR to ours |", "|---" * 6 + "|"]
    for against in dict.fromkeys(row["against"] for row in rows if row["against"]):
        own = [row for row in rows if row["against"] == against and row[STATE] == "ran"]
        took = medians(own)
        for (version, options), value in took.items():
            part = [row for row in own if (row["version"], row["options"]) == (version, options)]
            every = [float(row["seconds"]) for row in part]
            same = decibels(part[-1]["psnr_to_ours_db"])
            share = value / took.get((against, ""), value)
            name = f"{version} {options}".strip()
            lines.append(f"| {against} | {name} | {value:.1f} | {min(every):.1f} to {max(every):.1f} | {share:.0%} | {same} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", default=FIRST, metavar="COMMIT", help="of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="this tree alone at 256 px, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "demo.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, measured)
    if args.side < 256 or args.rounds < 1:
        parser.error(f"--side {args.side}: from 256; --rounds {args.rounds}: from 1")
    try:
        against = "" if args.quick else resolved(args.against)
    except ValueError as error:
        parser.error(str(error))
    side, rounds, csv = (256, 1, None) if args.quick else (args.side, args.rounds, args.csv)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) if args.quick else PICTURES / SUITE.settings()
        wanted = cases(side, against, rounds, pictures.absolute())
        rows = carried_out(SUITE, wanted, csv, 1 if args.quick else os.cpu_count() or 1, measured)
    print(table(rows), file=sys.stderr)
    verdict = kept(rows)
    print(json.dumps({"suite": "demo", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
