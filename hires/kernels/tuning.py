"""Launch configurations of the attention kernel from a readable table, by architecture and head size; read on first use."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tuning.json")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block may hold (CUDA programming guide, table 21)


@dataclass(frozen=True, slots=True)
class Config:
    """Queries and keys per step, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@functools.cache
def table() -> dict[str, dict[str, dict[str, int]]]:
    """Rows by 'default' or 'float32', ' sm_80' and so on where an architecture differs, then by the head size they reach."""
    loaded: dict[str, dict[str, dict[str, int]]] = json.loads(TABLE.read_text())
    return loaded


def config(head_dim: int, architecture: int, single: bool = False) -> Config:
    """The configuration for a head size on an architecture (89 for sm_89); `single`: for float32."""
    kind = "float32" if single else "default"
    rows = table()[kind] | table().get(f"{kind} sm_{architecture}", {})
    size = next((key for key in sorted(rows, key=int) if int(key) >= head_dim), None)
    if size is None:
        raise ValueError(f"no configuration for head size {head_dim}; the largest is {max(map(int, rows))}")
    return Config(**rows[size])
