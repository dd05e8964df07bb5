"""A1111's scheduling and AND: the text of every step."""

from __future__ import annotations

import time

import pytest

from hires.errors import RequestError
from hires.prompts.schedule import Part, Pass, read_schedule, split_and

BASE, REFINE = Pass(0, 4), Pass(1, 4, 4)


@pytest.mark.parametrize(
    ("text", "base", "refine"),
    [
        ("[a:b:0.5]", "aabb", "bbbb"),
        ("[a:b:3]", "aaab", "bbbb"),
        ("[a:b:6]", "aaaa", "aabb"),
        ("[a:b:1.5]", "aaaa", "aabb"),
        ("[a:b:99]", "aaaa", "aaaa"),
        ("[a:b:-1]", "bbbb", "bbbb"),
        ("[a:b: .5 ]", "aabb", "bbbb"),
        ("[a|b]", "abab", "abab"),
        ("[a:[b:c:0.75]:0.5]", "aabc", "cccc"),
        ("[[a|b]:c:0.5]", "abcc", "cccc"),
    ],
)
def test_the_text_of_every_step(text: str, base: str, refine: str) -> None:
    read = read_schedule(text)
    assert read.changes
    assert "".join(read.texts(BASE)) == base and "".join(read.texts(REFINE)) == refine


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("x [a:0.25] y", ["x  y", "x a y", "x a y", "x a y"]),
        ("[a::0.5]", ["a", "a", "", ""]),
        ("[fe|]male", ["female", "male", "female", "male"]),
        ("(x [a:b:0.5]:1.2)", ["(x a:1.2)"] * 2 + ["(x b:1.2)"] * 2),
        ("[(a:1.3):b:0.5] [c]", ["(a:1.3) [c]"] * 2 + ["b [c]"] * 2),
        ("[a:1.3]", [""] * 4),  # scheduling wins over a weight: a comes with the second stage
        (r"\[a:b:0.5\] [a:b:0.5]", [r"\[a:b:0.5\] a"] * 2 + [r"\[a:b:0.5\] b"] * 2),
        ("a:b [c:d:0.5]", ["a:b c"] * 2 + ["a:b d"] * 2),
    ],
)
def test_schedules_within_text(text: str, steps: list[str]) -> None:
    assert read_schedule(text).texts(BASE) == steps


@pytest.mark.parametrize("text", ["", "plain", "(x:1.3)", "[x]", "[a:b", "a] b", "a | b [c:d:0.5]", "[a:b:c:0.5]", "end\\"])
def test_what_is_no_schedule_stays_as_it_is(text: str) -> None:
    read = read_schedule(text)
    assert not read.changes and read.texts(BASE) == [text] * 4


def test_brackets_without_end_are_read_in_no_time() -> None:
    begun = time.process_time()
    for text in ("[" * 4000, "(" * 4000 + "a", "[a:" * 2000, "[(" * 2000 + "a:b:0.5]" * 50):
        assert read_schedule(text).texts(BASE)[0]
    assert time.process_time() - begun < 4


def test_and_puts_prompts_together() -> None:
    assert split_and("a cat AND a dog:0.6 AND :-1") == [Part("a cat", 1.0), Part("a dog", 0.6), Part("", -1.0)]
    assert split_and("a AND") == [Part("a", 1.0), Part("", 1.0)]
    assert split_and("a band AND\nb") == [Part("a band", 1.0), Part("b", 1.0)]
    assert split_and("at 10:30, sand and land") == [Part("at 10:30, sand and land", 1.0)]
    with pytest.raises(RequestError, match=r"AND weight 1e\+09"):
        split_and("a AND b:1000000000")
