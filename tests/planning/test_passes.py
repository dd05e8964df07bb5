"""The planner's four passes: none calls an earlier one, and what is costly is computed once."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from benchmarks.full_size import full_spec
from hires.devices.machines import described_card
from hires.options.render import RenderRequest
from hires.planning.planner import plan
from hires.tiling.geometry import Size

ROOM = "hires.planning."
PASSES = {"describe": "describe", "search": "search", "explain": "explain"}  # the function that begins a pass: its module
OF_DESCRIBE = ("describe", "stages", "tiles", "presets")
OF_SEARCH = ("search", "costs.stages", "costs.text", "costs.flops", "costs.network_memory", "costs.evaluations")
REFUSED = {"describe": (*OF_SEARCH, "explain"), "search": (*OF_DESCRIBE, "explain"), "explain": (*OF_DESCRIBE, *OF_SEARCH)}
FIELDS = ("costs", "merged", "taken_steps", "seconds")  # properties of the values that flow


class Calls:
    """Every call within the planner while it makes a plan: how often, and by which pass."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.by_pass: set[tuple[str, str, str]] = set()

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if event != "call" or not module.startswith(ROOM):
            return
        self.count[name] += 1
        caller = frame.f_back
        while caller is not None:
            begun = caller.f_code.co_name
            if caller.f_globals.get("__name__", "") == ROOM + PASSES.get(begun, "?"):
                self.by_pass.add((begun, module.removeprefix(ROOM), name))
                break
            caller = caller.f_back


@pytest.fixture(scope="module")
def calls() -> Calls:
    """Those of a plan of CosXL at 8192 px on 24 GB."""
    spec, card = full_spec("cosxl"), described_card(24 * 10**9)
    traced = Calls()
    before = sys.getprofile()
    sys.setprofile(traced)
    try:
        made = plan(RenderRequest(prompt="a lake", size=Size(8192, 8192)), spec, card)
    finally:
        sys.setprofile(before)
    traced.count["stages of the plan"] = len(made.stages)
    return traced


def test_no_pass_calls_an_earlier_one(calls: Calls) -> None:
    assert {begun for begun, _, _ in calls.by_pass} == set(PASSES), "every pass was seen"
    wrong = [
        call for call in calls.by_pass if call[1] in REFUSED[call[0]] and call[2] not in FIELDS and not call[2].startswith("<")
    ]
    assert not wrong


def test_stages_are_costed_rarely_and_set_once(calls: Calls) -> None:
    assert 0 < calls.count["stage_cost"] <= 60, "153 in the planner that asked for every batch at every place of the weights"
    assert calls.count["stage_settings"] == calls.count["stages of the plan"] >= 4
    assert calls.count["describe"] == calls.count["search"] == 1
