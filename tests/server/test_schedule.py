"""Which job a free worker takes: loaded models first, short before long, and nobody waits for ever."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hires.devices.machines import described_card
from hires.server.schedule import LOOK_AHEAD, PATIENCE_SECONDS, Waiting, choose, planners

GB = 10**9


def job(model: str | None = "a", planned: float = 5.0, waited: float = 0.0) -> Waiting:
    return Waiting(model=model, planned_seconds=planned, waited_seconds=waited)


def queues(waited_most: float) -> st.SearchStrategy[list[Waiting]]:
    """Jobs in the order they came."""
    one = st.builds(
        Waiting,
        model=st.sampled_from(["a", "b", "c", None]),
        planned_seconds=st.floats(0.1, 500),
        waited_seconds=st.floats(0, waited_most, exclude_max=True),
    )
    return st.lists(one, min_size=1, max_size=20).map(lambda jobs: sorted(jobs, key=lambda each: -each.waited_seconds))


def test_nothing_waits() -> None:
    assert choose([], {"a"}) is None


def test_a_loaded_model_goes_first_however_long_its_job() -> None:
    waiting = [job("a", 1, 9), job("b", 300, 5), job("a", 1, 4)]
    assert choose(waiting, {"b"}) == 1
    assert choose(waiting, {"c"}) == 0, "without one, the order of the rest"


def test_what_needs_no_model_loads_nothing_either() -> None:
    assert choose([job("a", 1, 9), job(None, 2, 5)], {"b"}) == 1


@pytest.mark.parametrize("place", range(12))
def test_a_loaded_model_is_looked_for_among_the_eight_oldest(place: int) -> None:
    waiting = [job("b" if index == place else "a", 5, 20 - index) for index in range(12)]
    assert choose(waiting, {"b"}) == (place if place < LOOK_AHEAD else 0)
    assert LOOK_AHEAD == 8


@given(queues(PATIENCE_SECONDS), st.sets(st.sampled_from("abc")))
def test_the_job_taken_is_due_before_all_of_its_class(waiting: list[Waiting], resident: set[str]) -> None:
    def ready(index: int) -> bool:
        return index < 8 and (waiting[index].model in resident or waiting[index].model is None)

    chosen = choose(waiting, resident)
    assert chosen is not None
    rivals = [index for index in range(len(waiting)) if ready(index)] or [*range(len(waiting))]
    assert chosen in rivals
    for rival in rivals:
        ours, theirs = (waiting[i].planned_seconds - waiting[i].waited_seconds for i in (chosen, rival))
        assert ours < theirs or (ours == theirs and chosen <= rival)


@given(queues(3 * PATIENCE_SECONDS), st.sets(st.sampled_from("abc")))
def test_a_job_that_waited_a_minute_is_passed_by_no_younger_one(waiting: list[Waiting], resident: set[str]) -> None:
    chosen = choose(waiting, resident)
    assert chosen is not None
    assert not [index for index in range(chosen) if waiting[index].waited_seconds >= 60.0]
    if waiting[0].waited_seconds >= 60.0:
        assert chosen == 0


def test_short_before_long_and_the_older_of_equals() -> None:
    assert choose([job(planned=30, waited=10), job(planned=4, waited=2)], ()) == 1
    assert choose([job(planned=30, waited=29), job(planned=4, waited=2)], ()) == 0
    assert choose([job(planned=4, waited=2), job(planned=4, waited=1)], ()) == 0
    assert choose([job(planned=4), job(planned=4)], ()) == 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A job of a simulated day; `seconds` are what it takes and what is planned."""

    came: float
    seconds: float
    model: str = "a"


Choose = Callable[[Sequence[Waiting], set[str]], int | None]


def simulate(requests: Sequence[Request], choose: Choose, workers: int = 1, resident: int = 2, load: float = 0.0) -> Day:
    """Serve requests, sorted by when they come: when each one starts and ends, and how many models are loaded."""
    free, memories, coming = [0.0] * workers, [[] for _ in range(workers)], [*requests]
    waiting: list[Request] = []
    day = Day(started={}, ended={}, loads=0)
    while waiting or coming:
        worker = min(range(workers), key=lambda index: free[index])
        now = free[worker] if waiting else max(free[worker], coming[0].came)
        while coming and coming[0].came <= now:
            waiting.append(coming.pop(0))
        seen = [job(each.model, each.seconds, now - each.came) for each in waiting]
        chosen = choose(seen, {*memories[worker]})
        assert chosen is not None
        taken, memory = waiting.pop(chosen), memories[worker]
        known = taken.model in memory
        memories[worker] = [*(model for model in memory if model != taken.model), taken.model][-resident:]
        free[worker] = now + taken.seconds + (0 if known else load)
        day.started[taken], day.ended[taken], day.loads = now, free[worker], day.loads + (not known)
    return day


@dataclass(kw_only=True)
class Day:
    """What came of it."""

    started: dict[Request, float]
    ended: dict[Request, float]
    loads: int


@pytest.mark.parametrize("seconds", [10.0, 30.0, 50.0, 500.0])
def test_a_long_job_starts_among_a_steady_stream_of_short_ones(seconds: float) -> None:
    """As many short jobs as the worker can do, one of them always waiting: without ageing the long one would never start."""
    long = Request(came=0.5, seconds=seconds)
    stream = [Request(came=float(second), seconds=1.0) for second in range(200)]
    backlog = [Request(came=0.0, seconds=1.0)]
    day = simulate(sorted([*backlog, *stream, long], key=lambda each: each.came), choose)
    waited = day.started[long] - long.came
    assert min(seconds, 60.0) - 3 <= waited <= min(seconds, 60.0) + 2


def first_come(waiting: Sequence[Waiting], resident: set[str]) -> int:
    return 0


def test_a_day_of_a_fleet_loads_less_and_answers_sooner() -> None:
    """Eight cards with two models each at 0.7 of what they can do; six models, pictures from 2K to 16K, 4 s a load."""
    draw, came, requests = random.Random(5), 0.0, []
    for _ in range(4000):
        came += draw.expovariate(0.7 * 8 / 10.4)
        seconds = draw.choices((3.6, 8.1, 30.6, 258.0), (60, 28, 11, 1))[0]
        requests.append(Request(came=came, seconds=seconds, model=draw.choices("abcdef", [1 / i for i in range(1, 7)])[0]))
    ours, theirs = (simulate(requests, rule, workers=8, load=4.0) for rule in (choose, first_come))
    small = [each for each in requests if each.seconds < 4]
    answer, before = (mean(day.ended[each] - each.came for each in small) for day in (ours, theirs))
    assert ours.loads < 0.9 * theirs.loads
    assert answer < 0.8 * before
    largest = [each for each in requests if each.seconds > 200]
    assert mean(ours.started[each] - each.came for each in largest) < 60 + mean(theirs.started[e] - e.came for e in largest)


def test_equal_cards_are_planned_for_once() -> None:
    small, large = described_card(8 * GB), described_card(24 * GB)
    first, second = (replace(large, name="card", budget_bytes=size) for size in (24 * GB, 23_900_000_000))
    assert planners([large, large]) == [0, 0]
    assert planners([large, small, large]) == [0, 1, 0]
    assert planners([first, second]) == [1, 1], "what fits the smaller one fits both"
    assert planners([replace(first, budget_bytes=20 * GB), second]) == [0, 1], "half of it is taken by something else"
    assert planners([first, replace(first, name="another")]) == [0, 1]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1 * GB, 3 * GB)), min_size=1, max_size=8))
def test_what_is_planned_for_fits(devices: list[tuple[str, int]]) -> None:
    specs = [replace(described_card(size), name=name) for name, size in devices]
    for spec, index in zip(specs, planners(specs), strict=True):
        planner = specs[index]
        assert planners(specs)[index] == index and planner.name == spec.name
        assert 0.98 * spec.budget_bytes <= planner.budget_bytes <= spec.budget_bytes
