"""A measurement in a process of its own, so that its peak memory is its own and no cache is warm from another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def in_child(suite: str, *arguments: str, threads: int | None = None, timeout: float | None = None) -> dict[str, Any]:
    """The last line of `python -m benchmarks SUITE --child ARGUMENTS` as JSON. {'state': 'over N s'} after the timeout."""
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, "-m", "benchmarks", suite, "--child", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"state": f"over {timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)}: {error.stderr[-2000:]}") from None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
