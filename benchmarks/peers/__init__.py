"""Ours beside what a user would take instead, part by part: the same weights and seeds, each peer at its defaults.

A part is a function of a way's name and a side that gives what to run and what is known of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hires._version import __version__

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """run: one call, whose result is an array or tensor of `span` from low to high; warm_up: a smaller one. facts: columns that
    are known beforehand. rows, cols: lines where pieces meet, in the result's last two axes, for the seam score. like: the way
    whose result this one's is held against, None where nothing else draws the same."""

    run: Callable[[], Any]
    warm_up: Callable[[], Any] | None = None
    facts: Row = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    cols: tuple[int, ...] = ()
    like: str | None = None
    repeats: int = 3


def version_of(*packages: str) -> str:
    """'diffusers 0.42.1' of what is installed; ours is hires whatever its distribution is called."""
    from importlib.metadata import version

    return ", ".join(f"{name} {__version__ if name == 'hires' else version(name)}" for name in packages)
