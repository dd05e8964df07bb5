"""Which of the waiting jobs a free worker takes, and which devices need one plan."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

from hires.devices.spec import DeviceSpec

LOOK_AHEAD = 8
"""Among how many of the oldest jobs one is preferred whose model is loaded."""
PATIENCE_SECONDS = 60.0
"""A job that has waited so long is passed over no more."""
SAME_BUDGET = 0.98
"""Of two equal cards one may have a little less free memory; beyond this share they are planned for each by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A job that waits, as a free worker sees it."""

    model: Hashable | None
    """What the networks of its next picture are known by; None where it needs none."""
    planned_seconds: float
    """What is left of it takes so long on this worker's kind of device, by its plan."""
    waited_seconds: float
    """Since the request came."""

    @property
    def due_seconds(self) -> float:
        """Planned seconds less waited seconds: how long it may still wait until it has waited for as long as it takes.

        The job with the least goes first, so short jobs go before long ones. Since all jobs age alike, the order of two jobs
        never changes: one of p planned seconds is passed only by shorter jobs that came less than p seconds after it. A steady
        stream of short jobs cannot hold it up any longer than that.
        """
        return self.planned_seconds - self.waited_seconds


def choose(waiting: Sequence[Waiting], resident: Collection[Hashable]) -> int | None:
    """The index of the job that a free worker takes; None where none waits.

    First a job that has waited for `PATIENCE_SECONDS`, the oldest one. Then those among the `LOOK_AHEAD` oldest that load
    nothing. Then all. Where there are several, the one with the least `due_seconds`, of equal ones the oldest.

    Args:
        waiting: the jobs that this worker may run, in the order they came.
        resident: the models in its memory, and the one that it used last.
    """
    overdue = (index for index, job in enumerate(waiting) if job.waited_seconds >= PATIENCE_SECONDS)
    oldest = next(overdue, None)
    if oldest is not None:
        return oldest
    ready = [index for index, job in enumerate(waiting[:LOOK_AHEAD]) if job.model is None or job.model in resident]
    return min(ready or range(len(waiting)), key=lambda index: waiting[index].due_seconds, default=None)


def planners(devices: Sequence[DeviceSpec]) -> list[int]:
    """For each device, the index of the one that is planned for in its stead: another of its name, with hardly less memory.

    Equal cards are one kind of device, and what is planned for the one with the least memory fits all of a kind.
    """
    stands_for = [*range(len(devices))]
    ordered = sorted(stands_for, key=lambda index: devices[index].budget_bytes)
    for place, index in enumerate(ordered):
        device = devices[index]
        for other in ordered[:place]:
            planner = devices[other]
            alike = planner.name == device.name and planner.budget_bytes >= SAME_BUDGET * device.budget_bytes
            if stands_for[other] == other and alike:
                stands_for[index] = other
                break
    return stands_for
