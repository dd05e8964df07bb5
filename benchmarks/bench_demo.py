"""`make demo` beside an earlier version of this repository: the same command from both trees in turn, on the same machine.

    python -m benchmarks demo                      # beside the first version that drew, 2048 px; seven minutes on two cores
    python -m benchmarks demo --against COMMIT     # beside any other that this clone has
    python -m benchmarks demo --quick              # this tree alone at 256 px, into no file

The whole command is timed, with what Python needs to start; both trees run in this environment, each with its own weights.
`--dtype bf16` is a row of its own, for a CPU that multiplies it. The last line of stdout is one JSON document; the exit code is
1 where this tree is slower than the other, or its picture in bf16 is below 50 dB of its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, append_row, commit, stamp

ROOT = Path(__file__).parents[1]
FIRST = "fb5067ad07"  # the first version that drew
CAPTION = "a sun on the right over green mountains and a lake at dusk"
SAME_DB = 50.0
START = "import sys; sys.argv[0] = 'hires'; from hires.cli import app; app()"


@dataclass(frozen=True, slots=True)
class Version:
    """A tree that renders, and the options beyond those of `make demo`."""

    name: str
    tree: Path
    options: tuple[str, ...] = ()


def unpacked(name: str, folder: Path) -> Version:
    """A commit's tree in a folder. ValueError where this clone has no such commit."""
    found = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True)
    if found.returncode:
        raise ValueError(f"--against {name!r}: this clone has no such commit ({found.stderr.decode().strip()})")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return Version(name, folder)


def seconds(version: Version, side: int, picture: Path) -> float:
    """Of the whole command. RuntimeError with what it said where it fails."""
    command = [sys.executable, "-c", START, "render", CAPTION, "--size", f"{side}x{side}", "-o", str(picture), "--overwrite"]
    environment = os.environ | {"PYTHONPATH": str(version.tree)}
    begun = time.perf_counter()
    ended = subprocess.run([*command, *version.options], cwd=version.tree, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{version.name}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return time.perf_counter() - begun


def measured(versions: Sequence[Version], side: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row per version: each round draws by all of them in turn. The first is this tree, which pictures are held against."""
    import numpy as np
    from PIL import Image

    from hires.metrics import psnr

    took: dict[str, list[float]] = {version.name: [] for version in versions}
    for index in range(rounds):
        for version in versions:
            took[version.name].append(seconds(version, side, folder / f"{versions.index(version)}.png"))
            print(f"round {index + 1}, {version.name}: {took[version.name][-1]:.1f} s", file=sys.stderr, flush=True)
    pictures = [np.asarray(Image.open(folder / f"{index}.png")) for index in range(len(versions))]
    return [
        {
            "side": side,
            "version": version.name,
            "options": " ".join(version.options),
            "rounds": rounds,
            "seconds": round(statistics.median(took[version.name]), 1),
            "least_s": round(min(took[version.name]), 1),
            "most_s": round(max(took[version.name]), 1),
            "psnr_to_ours_db": round(min(psnr(picture, pictures[0], 255.0), 999.0), 1),
        }
        for version, picture in zip(versions, pictures, strict=True)
    ]


def kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Not slower than the other version; in bf16 the same picture."""
    ours = float(rows[0]["seconds"])
    others = {row["version"]: float(row["seconds"]) for row in rows[1:] if not row["options"]}
    verdict = {f"{ours / other:.0%} of the seconds of {name}": ours <= other for name, other in others.items()}
    for row in rows:
        if row["options"]:
            verdict[f"{row['options']}: PSNR >= {SAME_DB:g} dB"] = float(row["psnr_to_ours_db"]) >= SAME_DB
    return verdict


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", default=FIRST, help="a commit of this repository")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="this tree alone at 256 px, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "demo.csv")
    args = parser.parse_args(argv)
    side, rounds = (256, 1) if args.quick else (args.side, args.rounds)
    if side < 256 or rounds < 1:
        parser.error(f"--side {side}: from 256; --rounds {rounds}: from 1")
    with tempfile.TemporaryDirectory() as scratch:
        folder, ours = Path(scratch), Version(commit(), ROOT)
        versions = [ours, Version(f"{ours.name} in bf16", ROOT, ("--dtype", "bf16"))]
        try:
            versions += [] if args.quick else [unpacked(args.against, folder / "tree")]
        except ValueError as error:
            parser.error(str(error))
        rows = [stamp() | row for row in measured(versions, side, rounds, folder)]
    if not args.quick:
        for row in rows:
            append_row(args.csv, row)
    verdict = kept(rows)
    print(json.dumps({"suite": "demo", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
