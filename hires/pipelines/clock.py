"""How far a whole render has come and when it will be done, added to its events."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hires.events import Event, OnEvent
from hires.planning.plan import MemoryPlan, StageCost

Kind = Literal["network", "vae"]
KINDS: tuple[Kind, ...] = ("network", "vae")
Paces = Mapping[Kind, float]
"""Measured over planned seconds: 1 where plans are right, 0.5 where a device is twice as fast."""
FEW = 0.1
"""The share of the VAE's work whose pace counts half beside the network's: small pictures are slow for their size."""
SETTLED = 0.02
"""The share of the network's work whose pace counts half beside that of the render before."""


@dataclass(slots=True)
class Part:
    """A part of a render: what the plan expects of it, and how far it has come."""

    kind: Kind
    planned: float
    """Seconds by the plan."""
    share: float = 0.0
    """How much of it is done, 0 to 1."""
    recalled: float = 0.0
    """How much of it a journal had."""
    seconds: float = 0.0
    """Measured so far."""

    @property
    def worked(self) -> float:
        """Planned seconds of what was computed now."""
        return self.planned * max(0.0, self.share - self.recalled)

    @property
    def measured(self) -> bool:
        """Whether it has a pace."""
        return self.worked > 0 and self.seconds > 0


class RenderClock:
    """Hands events on with the whole render's fraction, time left, elapsed seconds and device.

    Each part of a render weighs as many seconds as the plan expects, times what was measured over what was planned: of the
    network by the stage at work as far as it has come and by the stages before it, of the VAE by its own, once there is
    enough. What comes before the first stage, loading above all, counts as elapsed and as nothing else.

    Args:
        on_event: who listens; None for nobody.
        device: where it runs.
        before: the paces of an earlier render of the model on the device; None if there was none.
    """

    def __init__(self, on_event: OnEvent | None, device: str, before: Paces | None = None) -> None:
        self._on_event, self._device, self._before = on_event, device, before
        self._parts: dict[str, Part] = {}
        self._begun = self._last = time.monotonic()
        self.fraction = 0.0
        """What was told last."""

    def follow(self, parts: dict[str, Part]) -> None:
        """The parts to come, by the stages of their events and in their order."""
        self._parts = parts

    def hear(self, event: Event) -> None:
        """Take in an event, and hand it on."""
        now = time.monotonic()
        part = self._parts.get(event.stage)
        if part is not None:
            part.seconds += now - self._last
            part.share = max(part.share, min(1.0, event.done / max(1, event.total)))
            part.recalled = min(1.0, event.recalled / max(1, event.total))
            self._close_parts_before(event.stage)
        self._last = now
        if self._on_event is None:
            return
        left, whole = self._left()
        if whole > 0:
            self.fraction = max(self.fraction, 1 - left / whole)
        told = replace(
            event,
            fraction=1.0 if event.stage == "write" and event.done else self.fraction,
            eta_seconds=left if self._measured() or self._before is not None else None,
            elapsed=now - self._begun,
            device=self._device,
        )
        self._on_event(told)

    def _close_parts_before(self, stage: str) -> None:
        """Parts before the one at work are done: a sampler's evaluations may be fewer than planned, an enlarger skips some."""
        for name, part in self._parts.items():
            if name == stage:
                return
            part.recalled = min(1.0, part.recalled + 1 - part.share)
            part.share = 1.0

    def _measured(self) -> bool:
        return any(part.measured for part in self._parts.values())

    def _left(self) -> tuple[float, float]:
        """Expected seconds of what is left, and of the whole."""
        paces = self.paces()
        seconds = [(part.planned * paces[part.kind], part.share) for part in self._parts.values()]
        return sum(each * (1 - share) for each, share in seconds), sum(each for each, _ in seconds)

    def paces(self) -> dict[Kind, float]:
        """What planned seconds are multiplied by, from what was measured so far."""
        network, vae = ([part for part in self._parts.values() if part.kind == kind] for kind in KINDS)
        before = self._before or {}
        known = pace_of(network) or pace_of(vae) or 1.0
        pace = _measured_pace(network, SETTLED, before.get("network", known))
        return {"network": pace, "vae": _measured_pace(vae, FEW, before.get("vae", pace))}


def clocked(on_event: OnEvent | None, device: str, stages: Sequence[str]) -> OnEvent:
    """A listener to a run of a few equal stages of which no plan exists, which adds what `RenderClock` adds."""
    clock = RenderClock(on_event, device)
    clock.follow({stage: Part("network", 1.0) for stage in stages})
    return clock.hear


def as_part(on_event: OnEvent, start: float, end: float, begun: float) -> OnEvent:
    """A listener to one part of a run, which tells of the whole run: from fraction `start` to `end`, begun at a monotonic time.

    What follows the part is not known, so that only the last part has an `eta_seconds`.
    """

    def hear(event: Event) -> None:
        left = event.eta_seconds if end == 1 else None
        fraction = start + (end - start) * event.fraction
        on_event(replace(event, fraction=fraction, eta_seconds=left, elapsed=time.monotonic() - begun))

    return hear


def pace_of(parts: Sequence[Part]) -> float | None:
    """Measured over planned seconds of the last part at work as far as it has come, else of those before it.

    Later parts are like the last one: refinements in full batches of tiles, and not like a base picture of one tile.
    """
    pace = None
    for part in parts:
        if part.measured:
            own = part.seconds / part.worked
            pace = own if pace is None else pace + part.share * (own - pace)
    return pace


def _measured_pace(parts: Sequence[Part], few: float, expected: float) -> float:
    """The pace of parts; half of it is still the expected one where a share `few` of their planned seconds was measured."""
    own = pace_of(parts)
    if own is None:
        return expected
    worked, planned = sum(part.worked for part in parts), sum(part.planned for part in parts)
    return expected + worked / (worked + few * planned) * (own - expected)


def parts_of(plan: MemoryPlan) -> dict[str, Part]:
    """The parts of a render by the stages of its events, in their order; what enlarging takes is split by the pixels."""
    costs = {cost.stage: cost for cost in plan.costs}
    parts: dict[str, Part] = {}
    for index, stage in enumerate(plan.stages):
        cost = costs.get(stage.name, StageCost(stage=stage.name, peak_bytes=0, flops=0.0, seconds=0.0))
        if cost.enlarge_seconds:
            small, large = plan.stages[index - 1].canvas.area, stage.canvas.area
            for what, area in (("decode", small), ("encode", large)):
                planned = cost.enlarge_seconds * area / (small + large)
                parts[f"{what} for {stage.name}"] = Part("vae", planned)
        parts[stage.name] = Part("network", cost.seconds - cost.enlarge_seconds)
    if "decode" in costs:
        parts["decode"] = Part("vae", costs["decode"].seconds)
    return parts
