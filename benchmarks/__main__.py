"""`python -m benchmarks SUITE [options]`: the suites that need the repository; each has its own --help."""

from __future__ import annotations

import importlib
import sys

SUITES = {
    "attention": "benchmarks.bench_attention",
    "choices": "benchmarks.bench_choices",
    "demo": "benchmarks.bench_demo",
    "guides": "benchmarks.bench_guides",
    "hotspots": "benchmarks.bench_hotspots",
    "io": "benchmarks.bench_io",
    "lowpass": "benchmarks.bench_lowpass",
    "peers": "benchmarks.bench_peers",
    "planner": "benchmarks.bench_planner",
    "quick": "benchmarks.quick",
    "presets": "benchmarks.bench_presets",
    "group_norm": "benchmarks.bench_group_norm",
    "blend": "benchmarks.bench_blend",
    "report": "benchmarks.report",
    "scaling": "benchmarks.bench_scaling",
    "scenes": "benchmarks.bench_scenes",
    "strategies": "benchmarks.bench_strategies",
    "upscale": "benchmarks.bench_upscale",
    "vae": "benchmarks.bench_vae",
    "waterfall": "benchmarks.bench_waterfall",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        print(f"usage: python -m benchmarks {{{','.join(SUITES)}}} [options]", file=sys.stderr)
        return 2
    result: int = importlib.import_module(SUITES[sys.argv[1]]).main(sys.argv[2:])
    return result


if __name__ == "__main__":
    sys.exit(main())
