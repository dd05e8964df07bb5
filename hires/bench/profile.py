"""Traces a render and shows its costliest operators beside their floor.

It listens to a render's events; the engine knows nothing of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hires.bench.timing import peak_bandwidth, peak_flops
from hires.devices.probe import TORCH_DTYPE
from hires.errors import OutputError
from hires.events import Event, OnEvent
from hires.planning.plan import MemoryPlan

STEPS = 2  # of each stage are in the trace: the others are alike
PARTS = 8  # of stages without steps: batches, bands
ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
WRAPPERS = ("aten::conv2d", "aten::convolution", "aten::linear", "aten::scaled_dot_product_attention", "aten::matmul")


@dataclass(frozen=True, slots=True, kw_only=True)
class Costly:
    """An operator on one shape."""

    name: str
    shapes: str
    calls: int
    """How often it ran."""
    seconds: float
    """Its own time, without that of operators that it called."""
    floor_seconds: float | None
    """What the machine needs at least for its FLOPs and bytes; None where they are not counted."""


class Profile:
    """Records a render into a Chrome trace: the first steps of each stage and the first bands, all others being alike.

    Pass `hear` as `on_event`; at the end of the block the trace is written, and `costly` holds the costliest operators.
    """

    def __init__(self, path: Path, on_event: OnEvent | None = None) -> None:
        if path.suffix.lower() != ".json":
            raise OutputError(f"profile {path}: the name must end in .json (chrome://tracing and Perfetto read it)")
        if not path.parent.is_dir():
            raise OutputError(f"profile {path}: the folder {path.parent} does not exist; give another")
        self.path, self._on_event = path, on_event
        self.costly: list[Costly] = []
        self.recorded_seconds = 0.0
        self._profiler: Any = None
        self._stage, self._seen, self._recording = "", 0, True

    def __enter__(self) -> Profile:
        from torch.profiler import ProfilerActivity, profile

        self._activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=self._activities, record_shapes=True, with_flops=True)
        self._profiler.__enter__()
        self._begun = time.perf_counter()
        return self

    def hear(self, event: Event) -> None:
        """An event of the render: recording stops after enough of a stage, and goes on with the next."""
        if event.stage != self._stage:
            self._stage, self._seen = event.stage, 0
            self._record(True)
        self._seen = event.step if event.steps else self._seen + 1
        if self._seen >= (STEPS if event.steps else PARTS):
            self._record(False)
        if self._on_event is not None:
            self._on_event(event)

    def _record(self, on: bool) -> None:
        if on == self._recording:
            return
        now = time.perf_counter()
        if self._recording:
            self.recorded_seconds += now - self._begun
        self._begun, self._recording = now, on
        self._profiler.toggle_collection_dynamic(on, self._activities)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._record(False)
        self._profiler.__exit__(kind, error, trace)
        if kind is not None:
            return
        try:
            self._profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as failure:
            raise OutputError(f"profile {self.path}: cannot be written ({failure}); give another name") from None

    def report(self, plan: MemoryPlan) -> str:
        """The ten costliest operators on their shapes, their share of what was recorded and their distance to the floor."""
        device = torch.device("cuda:0" if torch.cuda.is_available() and not plan.device.startswith("CPU") else "cpu")
        dtype = TORCH_DTYPE[plan.dtype]
        self.costly = costliest(self._profiler.key_averages(group_by_input_shape=True), device, dtype)
        whole = sum(one.seconds for one in self.costly) or 1.0
        lines = [
            f"{self.path}: {self.recorded_seconds:.1f} s recorded, {STEPS} steps of each stage; the costliest operators:",
            f"  {'operator':<34}{'calls':>7}{'seconds':>10}{'share':>8}{'floor s':>10}{'x floor':>9}  shapes",
        ]
        for one in self.costly[:10]:
            floor = f"{one.floor_seconds:>10.3f}{one.seconds / one.floor_seconds:>9.1f}" if one.floor_seconds else f"{'':>19}"
            lines.append(
                f"  {one.name[:33]:<34}{one.calls:>7}{one.seconds:>10.3f}{one.seconds / whole:>8.1%}{floor}  {one.shapes[:60]}"
            )
        return "\n".join(lines)


def costliest(averages: Any, device: torch.device, dtype: torch.dtype) -> list[Costly]:
    """Operators by their own time, longest first; the floor is the larger of FLOPs and bytes over the measured peaks."""
    compute, copies = peak_flops(device, dtype), peak_bandwidth(device)
    convolved, operators = convolution_flops(averages), []
    for entry in averages:
        own = entry.self_device_time_total if device.type == "cuda" else entry.self_cpu_time_total
        if own <= 0 or entry.key.startswith(("cuda", "ProfilerStep")):
            continue
        shapes = [tuple(shape) for shape in entry.input_shapes if shape and all(isinstance(side, int) for side in shape)]
        one = convolved.get(tuple(shapes[:2]), 0.0) if "conv" in entry.key else attention_flops(entry.key, shapes)
        flops = float(entry.flops or 0) or one * entry.count
        moved = (
            (sum(math.prod(shape) for shape in shapes) + results(flops / entry.count, shapes)) * dtype.itemsize * entry.count
        )
        plain = entry.key not in WRAPPERS and (flops or moved)
        floor = max(flops / compute, moved / copies) if plain else None
        text = ", ".join("x".join(map(str, shape)) for shape in shapes)
        operators.append(Costly(name=entry.key, shapes=text, calls=entry.count, seconds=own / 1e6, floor_seconds=floor))
    return sorted(operators, key=lambda one: -one.seconds)


def convolution_flops(averages: Any) -> dict[tuple[tuple[int, ...], ...], float]:
    """FLOPs of one convolution by the shapes of its map and its weights.

    The profiler counts them at `aten::conv2d`, whose time is its kernel's.
    """
    counted = {}
    for entry in averages:
        if entry.key == "aten::conv2d" and entry.flops:
            counted[tuple(map(tuple, entry.input_shapes[:2]))] = float(entry.flops) / entry.count
    return counted


def results(flops: float, shapes: Sequence[tuple[int, ...]]) -> float:
    """Values that a convolution or a matrix product writes, by the length of its sums; 0 for what is neither."""
    if not flops or len(shapes) < 2:
        return 0.0
    if len(shapes[1]) == 4 and len(shapes[0]) == 4 and shapes[0][1] % shapes[1][1] == 0 and shapes[1][2] == shapes[1][3]:
        return flops / (2 * math.prod(shapes[1][1:]))
    return float(shapes[0][-2] * shapes[1][-1]) if len(shapes[0]) == len(shapes[1]) == 2 else 0.0


def attention_flops(name: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """Of one fused attention by its inputs (B, heads, N, d), which the profiler does not count; 0 for anything else."""
    if not any(part in name for part in ATTENTION) or len(shapes) < 2 or len(shapes[0]) != 4:
        return 0.0
    batch, heads, queries, width = shapes[0]
    return 4.0 * batch * heads * queries * shapes[1][2] * width
