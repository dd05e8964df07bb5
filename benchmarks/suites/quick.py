"""`python -m benchmarks quick`: every suite, `hires bench` and the GPU suite's dry run at toy sizes, two at a time.

For CI: that everything runs; no rows are kept. A suite may find its limits broken at toy sizes (exit code 1).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS, WHOLE_SECONDS = 480, 600  # of one, of all
SCENES = ("--counts", "1,0,0", "--tiled", "0,0,0", "--direct", "0,0,0")


@dataclass(frozen=True, slots=True)
class Job:
    """A command after the interpreter; limits: whether exit code 1 is a limit that toys break."""

    name: str
    arguments: tuple[str, ...]
    limits: bool = False


def suite(name: str, *arguments: str, limits: bool = False) -> Job:
    return Job(name, ("-m", "benchmarks", name, *arguments), limits)


def jobs(scratch: Path) -> list[Job]:
    """All of them, the longest first."""
    kept = str(scratch)
    return [
        Job("gpu_suite", ("benchmarks/gpu_suite.py", "--dry", "--out", f"{kept}/gpu", "--minutes", "5")),
        Job("hires bench all", ("-m", "hires", "bench", "all", "--quick", "--device", "cpu", "--csv", f"{kept}/b.csv")),
        suite("peers", "--quick", limits=True),
        suite("waterfall", "--quick", limits=True),
        suite("scaling", "--quick"),
        suite("presets", "--quick"),
        suite("choices", "--quick"),
        suite("hotspots", "--quick"),
        suite("demo", "--quick", limits=True),
        suite("engine", "--quick"),
        suite("scenes", *SCENES, "--pictures", f"{kept}/scenes", limits=True),
        suite("strategies", "--quick", limits=True),
        suite("vae", "--size", "128x128", "--repeats", "1", "--defaults-at", "0x0", limits=True),
        suite("planner", "--quick"),
        suite("attention", "--quick"),
        suite("io", "--width", "256", "--heights", "256,512", "--repeats", "1", limits=True),
        suite("guides", "--seeds", "1", "--side", "128", limits=True),
        suite("lowpass", "--cells", "64", "--repeats", "2", limits=True),
        suite("group_norm", "--quick"),
        suite("blend", "--quick"),
        suite("weights", "--side", "256", limits=True),
        suite("report", "--check"),
    ]


def run(job: Job, environment: dict[str, str]) -> tuple[Job, float, str]:
    """How long it took, and what went wrong."""
    begun = time.monotonic()
    try:
        ended = subprocess.run(
            [sys.executable, *job.arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return job, time.monotonic() - begun, f"over {LIMIT_SECONDS} s"
    fine = ended.returncode == 0 or (job.limits and ended.returncode == 1 and "Traceback" not in ended.stderr)
    said = f"exit code {ended.returncode}\n{(ended.stderr or ended.stdout)[-3000:]}"
    return job, time.monotonic() - begun, "" if fine else said


def main(arguments: list[str]) -> int:
    if arguments:
        print("usage: python -m benchmarks quick", file=sys.stderr)
        return 2
    begun, failed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HIRES_BENCH_RESULTS": f"{folder}/results"}
        environment |= {"XDG_CACHE_HOME": f"{folder}/cache"}
        own = {"HIRES_BENCH_RESULTS": str(ROOT / "benchmarks" / "results")}  # the page is of the rows that are kept

        def ran(job: Job) -> tuple[Job, float, str]:
            return run(job, environment | own if job.name == "report" else environment)

        for job, seconds, error in pool.map(ran, jobs(Path(folder))):
            print(f"{job.name}: {seconds:.0f} s{', FAILED ' + error if error else ''}", flush=True)
            failed += [job.name] if error else []
    failed += [f"over {WHOLE_SECONDS} s in all"] if time.monotonic() - begun > WHOLE_SECONDS else []
    print(f"{time.monotonic() - begun:.0f} s in all, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return int(bool(failed))
