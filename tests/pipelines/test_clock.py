"""The fraction, the time left and the elapsed seconds of a whole render."""

from __future__ import annotations

import pytest

import hires
from hires.events import Event
from hires.pipelines.clock import Part, RenderClock, as_part, clocked, parts_of

SPEED = {"network": 0.25, "vae": 0.5}  # measured over planned seconds


class Replay:
    """A clock fed with the events of a render whose parts take what their plan says times SPEED."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Part], before: dict[str, float] | None = None) -> None:
        self.now, self.told = 50.0, list[tuple[float, Event]]()
        monkeypatch.setattr("hires.pipelines.clock.time.monotonic", lambda: self.now)
        self.parts = {name: (part.kind, part.planned) for name, part in parts.items()}
        self.clock = RenderClock(lambda event: self.told.append((self.now, event)), "cpu", before)  # type: ignore[arg-type]
        self.clock.follow(parts)

    def run(self, pieces: int = 20, recalled: int = 0) -> None:
        """All parts in turn; the first has `recalled` pieces from a journal."""
        self.now += 30.0
        self.clock.hear(Event(stage="load", done=1, total=1))
        for name, (kind, planned) in self.parts.items():
            for done in range(recalled, pieces + 1):
                self.now += planned * SPEED[kind] / pieces if done > recalled else 0.0
                self.clock.hear(Event(stage=name, done=done, total=pieces, recalled=recalled))
            recalled = 0

    def errors(self) -> list[tuple[float, float]]:
        """(share of the drawing that has passed, time left as told over as it was) of all events but the last ones."""
        begun = self.told[0][0]
        drawn = [(time, event) for time, event in self.told if event.stage != "load" and event.eta_seconds is not None]
        whole = self.now - begun
        return [
            ((time - begun) / whole, (event.eta_seconds or 0.0) / (self.now - time)) for time, event in drawn if time < self.now
        ]


@pytest.fixture
def parts() -> dict[str, Part]:
    return parts_of(hires.plan("", size="2048x2048", device="cpu"))


def test_parts_are_the_stages_of_the_events_and_their_seconds_those_of_the_plan(parts: dict[str, Part]) -> None:
    plan = hires.plan("", size="2048x2048", device="cpu")
    names = [stage.name for stage in plan.stages[1:]]
    expected = ["base"] + [part for name in names for part in (f"decode for {name}", f"encode for {name}", name)] + ["decode"]
    assert list(parts) == expected
    text = next(cost.seconds for cost in plan.costs if cost.stage == "text")
    assert sum(part.planned for part in parts.values()) == pytest.approx(plan.seconds - text)
    assert all(part.planned > 0 for part in parts.values())


def test_time_left_is_right_after_a_tenth_where_every_plan_is_wrong_by_a_factor(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Part]
) -> None:
    replay = Replay(monkeypatch, parts)
    replay.run()
    after = [error for share, error in replay.errors() if 0.1 <= share < 0.95]
    assert len(after) > 50 and all(0.75 <= error <= 1.25 for error in after), (min(after), max(after))


def test_fractions_rise_to_one_and_loading_is_no_part_of_them(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Part]) -> None:
    replay = Replay(monkeypatch, parts)
    replay.run()
    events = [event for _, event in replay.told]
    fractions = [event.fraction for event in events]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert events[0].stage == "load" and events[0].fraction == 0.0 and events[0].eta_seconds is None
    assert events[0].elapsed == 30.0 and {event.device for event in events} == {"cpu"}
    begun = replay.told[0][0]
    passed = [(time - begun) / (replay.now - begun) for time, _ in replay.told]
    assert max(abs(share - fraction) for share, fraction in zip(passed, fractions, strict=True)) < 0.1


def test_a_render_before_tells_the_time_from_the_first_event(monkeypatch: pytest.MonkeyPatch, parts: dict[str, Part]) -> None:
    first = Replay(monkeypatch, parts)
    first.run()
    second = Replay(monkeypatch, parts_of(hires.plan("", size="1024x1024", device="cpu")), dict(first.clock.paces()))
    second.run()
    loading = second.told[0][1].eta_seconds
    assert loading == pytest.approx(second.now - second.told[0][0], rel=0.1)
    assert all(0.85 <= error <= 1.15 for share, error in second.errors() if share < 0.95)


def test_recalled_work_is_no_measure_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(monkeypatch, {"base": Part("network", 10.0), "decode": Part("vae", 10.0)})
    replay.run(pieces=20, recalled=15)
    at_16 = next(event for _, event in replay.told if event.stage == "base" and event.done == 16)
    assert at_16.eta_seconds == pytest.approx((10.0 * 4 / 20 + 10.0) * SPEED["network"]), "the VAE is not measured yet"
    skipped = RenderClock(replay.told.append, "cpu")  # type: ignore[arg-type]
    skipped.follow({"base": Part("network", 10.0), "encode": Part("vae", 5.0), "refine 1": Part("network", 10.0)})
    skipped.hear(Event(stage="base", done=4, total=4, recalled=4))
    skipped.hear(Event(stage="refine 1", done=0, total=4))
    assert replay.told[-1].eta_seconds is None, "nothing was computed: the journal had it all"  # type: ignore[attr-defined]
    replay.now += 2.0
    skipped.hear(Event(stage="refine 1", done=2, total=4))
    assert replay.told[-1].eta_seconds == pytest.approx(2.0)  # type: ignore[attr-defined]


def test_a_part_of_a_run_tells_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[Event]()
    monkeypatch.setattr("hires.pipelines.clock.time.monotonic", lambda: 12.0)
    first = clocked(as_part(told.append, 0.0, 0.25, begun=10.0), "cpu", ("enlarge",))
    first(Event(stage="enlarge", done=1, total=2))
    last = as_part(told.append, 0.25, 1.0, begun=10.0)
    last(Event(stage="base", done=1, total=2, fraction=0.5, eta_seconds=7.0))
    assert [event.fraction for event in told] == [0.125, 0.625]
    assert [event.eta_seconds for event in told] == [None, 7.0]
    assert [event.elapsed for event in told] == [2.0, 2.0]
