"""What becomes of freed pages while several renders of one process overlap."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import pytest

from hires.devices import memory
from hires.devices.memory import MALLOC, FreedPages, PagePolicy, freed_pages

TRIM = "trim"
FRUGAL: tuple[FreedPages, ...] = ("returned", "usual", "kept")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the C library is told, in order: the way whose options it gets, or `TRIM`."""
    heard: list[str] = []

    def options(values: Mapping[int, int]) -> None:
        heard.append(next(way for way, known in MALLOC.items() if known == values))

    monkeypatch.setattr(memory, "_set_malloc_options", options)
    monkeypatch.setattr(memory, "_return_free_pages", lambda: heard.append(TRIM))
    monkeypatch.setattr(memory, "PAGE_POLICY", PagePolicy())
    return heard


def test_one_block_has_its_way_and_leaves_the_default(told: list[str]) -> None:
    with freed_pages("kept"):
        assert told == ["kept"]
    assert told == ["kept", "usual", TRIM]
    with pytest.raises(KeyError), freed_pages("returned"):
        raise KeyError
    assert told[3:] == ["returned", "usual", TRIM]


def test_usual_blocks_touch_nothing(told: list[str]) -> None:
    with freed_pages("usual"), freed_pages("usual"):
        pass
    assert told == []


def test_a_usual_block_beside_one_that_keeps_is_respected(told: list[str]) -> None:
    with freed_pages("kept"):
        with freed_pages("usual"):
            assert told == ["kept", "usual"]
        assert told == ["kept", "usual", "kept"], "what the remaining one wants holds again, and nothing is trimmed"
    assert told[3:] == ["usual", TRIM]


def test_a_block_that_ends_first_does_not_undo_the_other(told: list[str]) -> None:
    """Two workers: the one that returns its memory starts last and ends first, then the other way round."""
    first, second = freed_pages("kept"), freed_pages("returned")
    first.__enter__()
    second.__enter__()
    second.__exit__(None, None, None)
    assert told == ["kept", "returned", "kept"]
    first.__exit__(None, None, None)
    assert told == ["kept", "returned", "kept", "usual", TRIM]
    told.clear()
    first, second = freed_pages("kept"), freed_pages("returned")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert told == ["kept", "returned"], "the frugal one goes on as it was"
    second.__exit__(None, None, None)
    assert told == ["kept", "returned", "usual", TRIM]


@pytest.mark.parametrize("ending", [*permutations(range(4))])
def test_the_most_frugal_way_at_work_is_in_force_in_any_order(told: list[str], ending: tuple[int, ...]) -> None:
    ways: tuple[FreedPages, ...] = ("kept", "usual", "returned", "kept")
    blocks = [freed_pages(way) for way in ways]
    for block in blocks:
        block.__enter__()
    left = [*range(4)]
    for index in ending:
        assert told[-1] == min((ways[i] for i in left), key=FRUGAL.index)
        assert TRIM not in told
        blocks[index].__exit__(None, None, None)
        left.remove(index)
    assert told[-2:] == ["usual", TRIM]


def test_every_way_sets_every_option() -> None:
    """Else what another way set before would go on holding."""
    assert len({frozenset(options) for options in MALLOC.values()}) == 1
