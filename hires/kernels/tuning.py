"""Launch configurations of the kernels, by architecture, from tuning.json."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TABLE = Path(__file__).with_name("tuning.json")
SHARED_KIB = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}  # shared memory per block (CUDA guide, table 21)


@dataclass(frozen=True, slots=True)
class Config:
    """A launch of the attention kernel."""

    queries: int
    """Queries per program."""
    keys: int
    """Keys per step of the loop."""
    warps: int
    """Warps per program."""
    stages: int
    """Stages of the software pipeline."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a kernel on maps."""

    elements: int
    """Elements per program."""
    warps: int
    """Warps per program."""
    channels_last: int = 1
    """Channels per program if the map is channels-last."""


@functools.cache
def table() -> dict[str, Any]:
    """The table of tuning.json by kernel, read on first use.

    The rows of "attention" are keyed by 'default' or 'float32', with ' sm_80' and so on appended where an architecture
    differs, then by the largest head size they serve. Those of other kernels are keyed by 'default', 'sm_80' and so on.
    """
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


def architecture(x: Tensor) -> int:
    """The architecture of the device of x: 89 for sm_89; 80 if it is no CUDA device."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)
    return 10 * major + minor


def launch(kernel: str, x: Tensor) -> Launch:
    """The launch of a kernel on maps on the device of x."""
    rows = table()[kernel]
    return Launch(**rows.get(f"sm_{architecture(x)}", rows["default"]))


def config(head_dim: int, architecture: int, single: bool = False) -> Config:
    """The attention launch for a head size on an architecture (89 for sm_89). ValueError if the head is too large.

    single: whether the dtype is float32.
    """
    kind = "float32" if single else "default"
    attention = table()["attention"]
    rows = attention[kind] | attention.get(f"{kind} sm_{architecture}", {})
    size = next((key for key in sorted(rows, key=int) if int(key) >= head_dim), None)
    if size is None:
        raise ValueError(f"no launch configuration for head size {head_dim}: give at most {max(map(int, rows))}")
    return Config(**rows[size])
