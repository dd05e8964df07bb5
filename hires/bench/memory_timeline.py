"""Memory over time while a render runs, as a drawing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hires.errors import OutputError, RequestError
from hires.events import Event, OnEvent
from hires.planning.plan import MemoryPlan
from hires.units import gib


@dataclass
class MemoryTimeline:
    """Samples what a process holds while it renders, and draws it beside the plan.

    On a card: what torch's allocator has reserved. On a CPU: resident bytes beyond those before the first stage.
    """

    path: Path
    """The drawing, .png or .svg."""
    on_event: OnEvent | None = None
    """Who hears the render's events as well."""
    every_seconds: float = 0.02
    """The time between samples."""
    samples: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, bytes) since the beginning."""
    stages: list[tuple[str, float]] = field(default_factory=list)
    """Each stage and when it was last heard of."""

    def __post_init__(self) -> None:
        from hires.bench.plots import check_picture

        check_picture("memory_timeline", self.path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._begun = time.monotonic()

    def __enter__(self) -> MemoryTimeline:
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def hear(self, event: Event) -> None:
        """An event of the render: when each stage was last heard of. It began when the one before was."""
        now = time.monotonic() - self._begun
        if self.stages and self.stages[-1][0] == event.stage:
            self.stages.pop()
        self.stages.append((event.stage, now))
        if self.on_event is not None:
            self.on_event(event)

    def _sample(self) -> None:
        while not self._stop.wait(self.every_seconds):
            self.samples.append((time.monotonic() - self._begun, held_bytes()))

    def spans(self, plan: MemoryPlan) -> list[tuple[float, float, str, int]]:
        """(begin, end, stage, planned bytes) of the stages that a plan has costs of."""
        planned = {cost.stage: cost.peak_bytes for cost in plan.costs}
        begins = [0.0, *(end for _, end in self.stages)]
        spans = zip(begins, self.stages, strict=False)
        return [(begin, end, stage, planned[stage]) for begin, (stage, end) in spans if stage in planned]

    def base_bytes(self, plan: MemoryPlan) -> int:
        """What was held before the first stage, on a CPU, where plans are of the working memory beyond."""
        spans = self.spans(plan)
        if not plan.device.startswith("CPU") or not spans:
            return 0
        before = [held for at, held in self.samples if at <= spans[0][0]]
        return before[-1] if before else self.samples[0][1]

    def draw(self, plan: MemoryPlan) -> str:
        """Write the picture; one line per stage, planned beside measured. RequestError where nothing was sampled."""
        from matplotlib.figure import Figure

        if not self.samples:
            raise RequestError("`memory_timeline`: the render was over before anything was sampled")
        base, spans = self.base_bytes(plan), self.spans(plan)
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [at for at, _ in self.samples],
            [(held - base) / 2**30 for _, held in self.samples],
            color="#2563eb",
            lw=1,
            label="measured",
        )
        lines = []
        for index, (begin, end, stage, planned) in enumerate(spans):
            axes.plot([begin, end], [planned / 2**30] * 2, color="#dc2626", lw=1.5, label="planned" if index == 0 else None)
            axes.axvline(begin, color="#9ca3af", lw=0.5)
            axes.text(begin, 1.01, f" {stage}", transform=axes.get_xaxis_transform(), fontsize=8)
            peak = max((held for at, held in self.samples if begin <= at <= end), default=base) - base
            lines.append(f"  {stage:<12} planned {gib(planned)}, measured {gib(peak)}")
        axes.axhline(plan.budget_bytes / 2**30, color="#6b7280", ls="--", lw=0.8, label="budget")
        top = max([planned for *_, planned in spans] + [held - base for _, held in self.samples])
        axes.set_ylim(0, 1.15 * top / 2**30)
        axes.set_xlabel("seconds")
        axes.set_ylabel("GiB" + (" beyond libraries and weights" if base else ""))
        axes.legend(fontsize=8, loc="upper left")
        try:
            figure.savefig(self.path, dpi=120)
        except OSError as error:
            raise OutputError(f"memory_timeline {self.path}: cannot be written ({error.strerror or error})") from None
        return "\n".join([f"{self.path}:", *lines])


def held_bytes() -> int:
    """What torch's allocator has reserved on the card in use, else the process's resident memory."""
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 0:
        return int(torch.cuda.memory_reserved())
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * 4096
    from hires.devices.memory import peak_resident_bytes

    return peak_resident_bytes()
