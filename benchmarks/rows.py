"""Rows measured one by one, each in a process of its own, and kept: a suite stopped anywhere goes on where it was.

A process of its own has its own peak of memory, and one that runs out of it, or of time, leaves a row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import append_row, code_of_pictures, digest, file_of, read_rows, stamp

Case = Mapping[str, str]
Row = dict[str, Any]
Measure = Callable[[Case], Row]
ROOT = Path(__file__).parents[1]
STATE = "state"
MEMORY_LEFT = 0.9  # of what is free: a row that needs more is out of memory, and the machine is not


class AbsentError(Exception):
    """What a row needs is not here: test data, a package. The row is skipped and says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A table of rows. `key`: the columns that say what a row is of; `columns`: what is measured; `code`: the files of
    benchmarks/ that decide its numbers; `limit_s`: the most a row may take."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]
    code: tuple[str, ...]
    limit_s: float = 600.0

    def settings(self) -> str:
        """Changes with the code and the weights that the rows come from."""
        return digest([*code_of_pictures(), *(file_of(name) for name in ("rows", *self.code))])


def carried_out(suite: Suite, cases: Iterable[Case], csv: Path | None, threads: int, measure: Measure) -> list[Row]:
    """The rows of all cases: those that the file has for this code and thread count, and the others measured and appended.

    Without a file only the first has a process of its own: each would import for longer than a small row takes.
    """
    key = suite.settings()
    found: list[Row] = []
    for case in cases:
        kept = None if csv is None else _kept(suite, case, csv, key, threads)
        if kept is not None:
            row = kept
        elif csv is None and found:
            row = _whole(suite, case, key, threads, in_process(measure, case, threads))
        else:
            row = _whole(suite, case, key, threads, in_child(suite, case, threads))
        if csv is not None and kept is None:
            append_row(csv, row)
        print(
            "kept" if kept else "measured", {name: row[name] for name in (*suite.key, STATE, *suite.columns)}, file=sys.stderr
        )
        found.append(row)
    return found


def _kept(suite: Suite, case: Case, csv: Path, key: str, threads: int) -> Row | None:
    """The row there is for the same code, machine and torch, unless what it needed was absent."""
    here = {name: value for name, value in stamp().items() if name in ("machine", "torch")}
    wanted = {**{name: str(case[name]) for name in suite.key}, "settings": key, "threads": str(threads), **here}
    rows = [row for row in read_rows(csv) if all(row[name] == value for name, value in wanted.items())]
    return dict(rows[-1]) if rows and not rows[-1][STATE].startswith("skipped") else None


def _whole(suite: Suite, case: Case, key: str, threads: int, measured: Mapping[str, Any]) -> Row:
    columns = {name: measured.get(name, "") for name in suite.columns}
    facts = {name: case[name] for name in suite.key}
    return {**stamp(), "settings": key, "threads": threads, **facts, STATE: measured.get(STATE, "ran"), **columns}


def in_child(suite: Suite, case: Case, threads: int) -> Mapping[str, Any]:
    """What one process finds; out of memory, or out of time, is a state. RuntimeError with its last words for anything else."""
    command = [sys.executable, "-m", "benchmarks", suite.name, "--child", json.dumps(dict(case))]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=suite.limit_s)
    except subprocess.TimeoutExpired:
        return {STATE: f"over {suite.limit_s:g} s"}
    if done.returncode == 0:
        found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    if done.returncode == -9:
        return {STATE: "out of memory"}
    raise RuntimeError(f"{suite.name} {dict(case)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def in_process(measure: Measure, case: Case, threads: int) -> Row:
    """What this process finds; what is absent, or out of memory, is a state."""
    import torch

    from hires.tiling.retry import is_out_of_memory

    torch.set_num_threads(threads)
    try:
        return measure(case)
    except AbsentError as error:
        return {STATE: f"skipped: {error}"}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {STATE: "out of memory"}


def child(text: str, measure: Measure) -> int:
    """The other end of `in_child`: measure one case within the memory that is free, print what was found as JSON."""
    import torch

    bound_memory()
    print(json.dumps(in_process(measure, json.loads(text), torch.get_num_threads())))
    return 0


def bound_memory() -> None:
    """Refuse what goes beyond the memory that is free now, so that the system does not have to choose whom to end."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(free * MEMORY_LEFT), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, Row]:
    """The last result, and seconds by quantile with the peak above what was held before the first counted call."""
    from hires.bench.row import resident_from_now
    from hires.bench.timing import quantile
    from hires.devices.memory import peak_resident_bytes

    held, taken, result = resident_from_now() or 0, [], None
    for _ in range(repeats):
        result = None
        begun = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - begun)
    p20, p50, p80 = (round(quantile(taken, share), 3) for share in (0.2, 0.5, 0.8))
    peak = round((peak_resident_bytes() - held) / 2**20, 1)
    return result, {"p20_s": p20, "p50_s": p50, "p80_s": p80, "repeats": repeats, "peak_mib": peak}


def newest(rows: Sequence[Mapping[str, str]], key: Sequence[str]) -> list[Mapping[str, str]]:
    """The last row of every key, in the order in which the keys first came."""
    last: dict[tuple[str, ...], Mapping[str, str]] = {}
    for row in rows:
        last[tuple(row[name] for name in key)] = row
    return list(last.values())


def sides_of(parser: argparse.ArgumentParser, text: str) -> list[int]:
    """'512,1024' as numbers; anything else ends the program with exit code 2."""
    try:
        return [int(side) for side in text.split(",") if side.strip()]
    except ValueError:
        parser.error(f"--sides {text}: give numbers of pixels between commas, such as 512,1024")
