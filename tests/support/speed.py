"""How fast this machine is, for tests that bound what a command costs; and how much of a random test the fast suite runs."""

from __future__ import annotations

import functools
import resource
import subprocess
import sys

LOOP = "n = 0\nfor i in range(3_000_000): n += i * i % 7"
HALF_A_SECOND = 2.5  # loops, of 0.2 s each where the bound was set
full = True  # False in the fast suite, `-m "not slow"`; conftest.py sets it before it loads a test


def examples(fast: int, all_of_them: int) -> int:
    """How many examples hypothesis draws: `fast` of them with `-m "not slow"`, as `make test` runs, otherwise all."""
    return all_of_them if full else fast


def processor_seconds(code: str) -> tuple[float, str]:
    """Of a Python process that runs the code, and what it printed: its cost, not what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


@functools.cache
def half_a_second() -> float:
    """Half a second, or longer on a slower machine."""
    return max(0.5, HALF_A_SECOND * min(processor_seconds(LOOP)[0] for _ in range(3)))
