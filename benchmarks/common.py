"""What every benchmark row carries, and where rows go: commit, machine, torch, date, then the measurement."""

from __future__ import annotations

import csv
import datetime
import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import hires
from benchmarks.definitions import definitions

RESULTS = Path(os.environ.get("HIRES_BENCH_RESULTS", Path(__file__).parent / "results"))
EQUAL_DB = 999.0  # what equal results have, for JSON has no infinity

FRONTS = ("__init__", "__main__", "_version", "imageio", "server", "client", "cli", "bench")  # no row is about them
ALONE = ("attach",)  # nor about these, in any room


def decibels(value: object) -> str:
    """A PSNR of a row as tables show it."""
    return "equal" if float(str(value)) == EQUAL_DB else f"{float(str(value)):.1f} dB"


def commit() -> str:
    """The commit measured, with + where the tree has uncommitted changes to the code; 'unknown' outside a checkout."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        code = ["git", "status", "--porcelain", "--", "../hires", "."]
        changed = subprocess.run(code, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    dirty = [line for line in changed.stdout.splitlines() if "results/" not in line]
    return head.stdout.strip() + ("+" if dirty else "")


def machine() -> str:
    """Processor or card, cores, as a short text."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), model)
    return f"{model}, {os.cpu_count()} cores"


def stamp() -> dict[str, str]:
    """The columns that every row begins with."""
    import torch

    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {"commit": commit(), "machine": machine(), "torch": torch.__version__, "date": today}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row; a file whose columns differ is an error, not a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    existing = read_rows(path)
    if existing and list(existing[0]) != list(row):
        raise ValueError(f"{path}: has columns {list(existing[0])}, this row {list(row)}; move the old file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if not existing:
            writer.writeheader()
        writer.writerow(row)


def code_of_pictures() -> list[Path]:
    """The files of hires that decide what a row measures: all but the fronts, and the weights that ship."""
    package = Path(hires.__file__).parent
    first = {file: file.relative_to(package).parts[0].removesuffix(".py") for file in package.rglob("*.py")}
    kept = [file for file, name in first.items() if name not in FRONTS and file.stem not in ALONE]
    return [*kept, *package.glob("assets/demo/**/*.*")]


def file_of(name: str) -> Path:
    """The file of benchmarks/ that a suite names: 'bench_NAME' is a suite, any other name a file of any other folder."""
    here = Path(__file__).parent
    suite = here / "suites" / f"{name.removeprefix('bench_')}.py"
    if name.startswith("bench_"):
        return suite
    return next(file for file in here.rglob(f"{name}.py") if file != suite)


def digest(files: Iterable[Path]) -> str:
    """Ten hexadecimal digits that change with the definitions in Python files and with the bytes of all others.

    Where a definition stands, its docstrings and its imports do not count: code that only moves keeps its digits.
    """
    total = hashlib.sha256()
    for part in sorted({part for file in files for part in _parts(file)}):
        total.update(part)
    return total.hexdigest()[:10]


def _parts(file: Path) -> tuple[bytes, ...]:
    content = file.read_bytes()
    return _of_code(content.decode()) if file.suffix == ".py" else (hashlib.sha256(content).digest(),)


@cache
def _of_code(source: str) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(text.encode()).digest() for text in definitions(source))
