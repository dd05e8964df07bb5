"""The planner decides what it decided before the house was rebuilt; notes and messages may be worded anew."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.plans import COUNT, cases, planned, saved

WORDING = ("notes", "message", "alternatives", "reason")
NEWER = ("enlarge_seconds", "weights", "weight_bytes")  # what plans tell since then


def without_wording(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_wording(inner) for key, inner in value.items() if key not in (*WORDING, *NEWER)}
    return [without_wording(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def before() -> list[dict[str, Any]]:
    return saved()


@pytest.fixture(scope="module")
def after() -> list[dict[str, Any]]:
    return [planned(*case) for case in cases()]


def test_200_plans_are_what_they_were(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    assert len(before) == len(after) == COUNT
    assert sum("error" in plan for plan in before) < COUNT // 4, "most of the requests can be planned"
    different = [index for index in range(COUNT) if without_wording(before[index]) != without_wording(after[index])]
    assert not different, f"case {different[0]}: {before[different[0]]} was {after[different[0]]}"


def test_as_many_notes_as_before(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """A note may say it otherwise; none is lost."""
    assert [len(plan.get("notes", ())) for plan in before] == [len(plan.get("notes", ())) for plan in after]
