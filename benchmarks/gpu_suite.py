"""Everything that needs a card, in one command and in turns of at most nine minutes; needs the repository and installed wheels.

    python benchmarks/gpu_suite.py --slice kernels            # tests, kernels, vae, denoise, render, budgets
    python benchmarks/gpu_suite.py                            # all slices, as far as --minutes goes; run it again to go on
    python benchmarks/gpu_suite.py --dry                      # the same code on toys and a CPU, in a minute

Each finished piece is a line of OUT/gpu_suite.jsonl, and is not done again; OUT/summary.md is one page about all of them, and
OUT/gpu_*.csv are its rows. Out of memory is a value; an error is a line too, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import machine, stamp
from benchmarks.gpu.pieces import SLICES, Piece, Rows, Suite, pieces
from benchmarks.gpu.record import Record, summary
from hires.tiling.retry import free_memory


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/gpu_suite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slice", action="append", choices=SLICES, help="may be given several times; default: all")
    parser.add_argument("--dry", action="store_true", help="toys on a CPU: every code path in a minute")
    parser.add_argument("--out", type=Path, help="folder of the record; default: runs/gpu_suite, or runs/gpu_suite_dry")
    parser.add_argument("--minutes", type=float, default=9.0, help="no piece begins after so many")
    parser.add_argument("--again", action="store_true", help="run pieces that failed before once more")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("gpu_suite: no CUDA card here; run it where one is, or with --dry", file=sys.stderr)
        return 2
    suite = Suite(device=torch.device("cpu" if options.dry else "cuda:0"), dry=options.dry)
    out = options.out or Path("runs/gpu_suite_dry" if options.dry else "runs/gpu_suite")
    record, until = Record(out), time.monotonic() + 60 * options.minutes
    left: dict[str, int] = {}
    for name in options.slice or SLICES:
        own = [line for line in record.lines() if line["slice"] == name and line["stamp"]["machine"] == machine()]
        done = {line["name"] for line in own if not (options.again and line["error"])}
        for piece in pieces(suite, name):
            if piece.name in done:
                continue
            if time.monotonic() > until:
                left[name] = left.get(name, 0) + 1
                continue
            record.add(line_of(name, piece, 0.0, [], "was stopped"))  # stands where something ends this process
            record.add(finished(name, piece))
    record.tables()
    page = summary(record.lines(), left)
    (out / "summary.md").write_text(page)
    print(page)
    return int(any(line["error"] for line in record.lines()))


def finished(name: str, piece: Piece) -> dict[str, Any]:
    """A piece's line; an error is in it."""
    begun, rows, error = time.monotonic(), [], ""
    try:
        rows = piece.run()
    except Exception as found:  # noqa: BLE001  the record says it, and the next piece runs
        error = f"{type(found).__name__}: {found}\n{traceback.format_exc()[-2000:]}"
    free_memory()
    seconds = round(time.monotonic() - begun, 1)
    print(
        f"{name}: {piece.name}, {seconds} s{', FAILED ' + error.splitlines()[0] if error else ''}", file=sys.stderr, flush=True
    )
    return line_of(name, piece, seconds, rows, error)


def line_of(name: str, piece: Piece, seconds: float, rows: Rows, error: str) -> dict[str, Any]:
    return {"slice": name, "name": piece.name, "stamp": stamp(), "seconds": seconds, "rows": rows, "error": error}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
