"""The rows of `group_norm` and `blend`: one call on one real shape by one backend, with its bandwidth and its error."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import RESULTS, append_row, stamp
from hires.bench.timing import peak_bandwidth, rms, timed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One call: `run(backend)`, timed, moves at least `moved` bytes; `check(backend)` gives what `exact()` gives in float64."""

    operation: str
    shape: tuple[int, ...]
    moved: int
    run: Callable[[str], Tensor]
    check: Callable[[str], Tensor]
    exact: Callable[[], Tensor]


Jobs = Callable[[int, torch.dtype, torch.device], Iterator[Job]]


def bench(name: str, about: str, jobs: Jobs, backends: Sequence[str], arguments: list[str]) -> int:
    """Parse, measure, print rows and the JSON document."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    parser.add_argument("--size", action="append", type=int, metavar="PX", help="side of the picture; default 1024 to 8192")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a card, fp32 on a CPU")
    parser.add_argument("--backend", action="append", choices=tuple(backends))
    parser.add_argument("--quick", action="store_true", help="toy sizes: every code path in seconds")
    parser.add_argument("--csv", action="store_true", help=f"append to benchmarks/results/{name}.csv")
    options = parser.parse_args(arguments)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    sizes = options.size or ([64] if options.quick else [1024, 2048, 4096, 8192])
    rows = []
    for side in sizes:
        for job in jobs(side, DTYPES[kind], device):
            exact = None
            for backend in options.backend or backends:
                exact = job.exact() if exact is None else exact
                rows.append(measure(job, backend, exact, device, side, kind, 0.0 if options.quick else 1.0))
                print(line(rows[-1]))
                if options.csv:
                    append_row(RESULTS / f"{name}.csv", stamp() | rows[-1])
    print(json.dumps({"suite": name, "device": str(device), "rows": rows}))
    return 0


def measure(
    job: Job, backend: str, exact: Tensor, device: torch.device, side: int, kind: str, seconds: float
) -> dict[str, object]:
    taken = timed(lambda: job.run(backend), device, seconds=seconds)
    rate = job.moved / taken.p50 if taken.p50 else None
    error = rms(job.check(backend).cpu(), exact) if taken.p50 else None
    return {
        "side": side, "operation": job.operation, "shape": "x".join(map(str, job.shape)), "dtype": kind, "backend": backend,
        "p20_ms": milli(taken.p20), "p50_ms": milli(taken.p50), "p80_ms": milli(taken.p80), "repeats": taken.repeats,
        "gb_per_s": None if rate is None else round(rate / 1e9, 2),
        "share_of_copy": None if rate is None else round(rate / peak_bandwidth(device), 3),
        "peak_mib": round(taken.peak_bytes / 2**20, 1), "rms_error": None if error is None else float(f"{error:.3g}"),
        "state": taken.state,
    }  # fmt: skip


def milli(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 4)


def line(row: dict[str, object]) -> str:
    head = f"{row['side']:>5} {row['operation']:<24}{row['shape']:<22}{row['dtype']:<5}{row['backend']:<7}"
    if row["state"] != "ran":
        return head + str(row["state"])
    return (
        head + f"{row['p50_ms']:>10} ms {row['gb_per_s']:>8} GB/s ({row['share_of_copy']} of a copy), error {row['rms_error']}"
    )
