"""Launch configurations of the kernels from a readable table, by architecture; read on first use."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuning.json")
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # a block may hold (CUDA programming guide, table 21)


@dataclass(frozen=True, slots=True)
class Config:
    """Queries and keys per step, warps, stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Elements of one program, warps, and the channels of it where a map is channels-last."""

    elements: int
    warps: int
    channels_last: int = 1


@functools.cache
def table() -> dict[str, Any]:
    """By kernel. Attention's rows by 'default' or 'float32', ' sm_80' and so on where an architecture differs, then by the
    head size they reach; the others' by 'default' and 'sm_80'."""
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def architecture(x: Tensor) -> int:
    """89 for sm_89; 80 for what is no card."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


def launch(kernel: str, x: Tensor) -> Launch:
    """How a kernel on maps is launched on the device of x."""
    rows = table()[kernel]
    return Launch(**rows.get(f"sm_{architecture(x)}", rows["default"]))


def config(head_dim: int, architecture: int, single: bool = False) -> Config:
    """The configuration for a head size on an architecture (89 for sm_89); `single`: for float32."""
    kind = "float32" if single else "default"
    attention = table()["attention"]
    rows = attention[kind] | attention.get(f"{kind} sm_{architecture}", {})
    size = next((key for key in sorted(rows, key=int) if int(key) >= head_dim), None)
    if size is None:
        raise ValueError(f"no configuration for head size {head_dim}; the largest is {max(map(int, rows))}")
    return Config(**rows[size])
