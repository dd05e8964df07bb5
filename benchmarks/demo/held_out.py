"""Captions and seeds that training never draws; `held_out.json` is the committed list, this module reads it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from benchmarks.demo.scenes import Kind, Scene, scene

FILE = Path(__file__).with_name("held_out.json")
FIRST_SEED = 1_000_000  # training draws below, held-out scenes from here on


@lru_cache(maxsize=1)
def _read() -> tuple[tuple[Kind, int], ...]:
    rows = json.loads(FILE.read_text())["scenes"]
    return tuple(((r["disk"], r["third"], r["mountains"], r["ground"], r["time"]), r["seed"]) for r in rows)


def held_out_kinds() -> frozenset[Kind]:
    """The combinations of disk, third, mountains, ground and time that no training caption names."""
    return frozenset(kind for kind, _ in _read())


def held_out_scenes(count: int) -> list[Scene]:
    """The first `count` held-out scenes, ground truth included; ValueError beyond what the file lists."""
    rows = _read()
    if count > len(rows):
        raise ValueError(f"{FILE.name} lists {len(rows)} scenes, {count} asked for")
    return [scene(seed, kind) for kind, seed in rows[:count]]
