"""A worker that plans for a described device and draws nothing: for tests of queues, without the device."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

from hires.devices.spec import DeviceSpec
from hires.events import OnEvent
from hires.server.bodies import AnyTask
from hires.server.settings import Library, Settings
from hires.server.worker import Estimate, FinishedPicture, Worker
from hires.tiling.geometry import Size
from hires.units import parse_bytes


class StillWorker(Worker):
    """`drawn` are the prompts of its pictures, in order. Each picture waits for `go`, and `begun` says that one does."""

    def __init__(self, settings: Settings, library: Library, stand_in: DeviceSpec) -> None:
        self.stand_in = stand_in
        super().__init__(settings, library, "cpu")
        self.drawn: list[str] = []
        self.estimated: list[str] = []
        self.begun, self.go = threading.Event(), threading.Event()

    def describe(self, vram: str | None) -> DeviceSpec:
        budget = self.stand_in.budget_bytes if vram is None else min(parse_bytes(vram), self.stand_in.budget_bytes)
        return replace(self.stand_in, budget_bytes=budget)

    def estimate(self, task: AnyTask, folder: Path) -> Estimate:
        self.estimated.append(task.prompt)
        return super().estimate(task, folder)

    def run(self, task: AnyTask, folder: Path, name: str, on_event: OnEvent) -> FinishedPicture:
        self.drawn.append(task.prompt)
        self.begun.set()
        assert self.go.wait(60), "nobody lets the picture go"
        return FinishedPicture(file=f"{name}.png", size=Size(64, 64), seed=task.seed or 0, seconds=0.1)
