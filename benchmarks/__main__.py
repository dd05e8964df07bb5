"""`python -m benchmarks SUITE [options]`: the suites that need the repository; each has its own --help."""

from __future__ import annotations

import importlib
import sys

SUITES = {
    "attention": "benchmarks.suites.attention",
    "changed": "benchmarks.report.changed",
    "choices": "benchmarks.suites.choices",
    "demo": "benchmarks.suites.demo",
    "engine": "benchmarks.suites.engine",
    "guides": "benchmarks.suites.guides",
    "hotspots": "benchmarks.suites.hotspots",
    "io": "benchmarks.suites.io",
    "lowpass": "benchmarks.suites.lowpass",
    "peers": "benchmarks.suites.peers",
    "planner": "benchmarks.suites.planner",
    "quick": "benchmarks.suites.quick",
    "presets": "benchmarks.suites.presets",
    "house": "benchmarks.house",
    "group_norm": "benchmarks.suites.group_norm",
    "blend": "benchmarks.suites.blend",
    "report": "benchmarks.report.write",
    "scaling": "benchmarks.suites.scaling",
    "scenes": "benchmarks.suites.scenes",
    "strategies": "benchmarks.suites.strategies",
    "upscale": "benchmarks.suites.upscale",
    "vae": "benchmarks.suites.vae",
    "waterfall": "benchmarks.suites.waterfall",
    "weights": "benchmarks.suites.weights",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        print(f"usage: python -m benchmarks {{{','.join(SUITES)}}} [options]", file=sys.stderr)
        return 2
    result: int = importlib.import_module(SUITES[sys.argv[1]]).main(sys.argv[2:])
    return result


if __name__ == "__main__":
    sys.exit(main())
