"""Chunks of 75 tokens by both rules."""

from __future__ import annotations

import pytest

from hires.prompts.chunks import Group, Token, Vector, a1111_chunks, comfyui_chunks

COMMA = 267
BREAK = Group((), breaks=True)


def words(count: int, commas: tuple[int, ...] = ()) -> Group:
    return Group(tuple(Token(COMMA if place in commas else 5) for place in range(count)))


def embedding(rows: int) -> Group:
    return Group(tuple(Token(0, 1.0, Vector("e", row)) for row in range(rows)), whole=True)


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [
        ([words(0)], [0]),
        ([words(75)], [75]),
        ([words(76)], [75, 1]),
        ([words(93)], [75, 18]),
        ([words(151)], [75, 75, 1]),
        ([words(80, (54,))], [75, 5]),
        ([words(80, (55,))], [56, 24]),
        ([words(80, (56,))], [57, 23]),
        ([words(80, (60,))], [61, 19]),
        ([words(80, (74,))], [75, 5]),
        ([words(80, (75,))], [75, 5]),
        ([words(80, (60, 75))], [75, 5]),
        ([words(10), BREAK, words(5)], [10, 5]),
        ([BREAK, words(5)], [0, 5]),
        ([words(5), BREAK], [5]),
        ([words(75), BREAK, words(5)], [75, 5]),
        ([words(70), embedding(5)], [75]),
        ([words(70), embedding(6)], [70, 6]),
    ],
)
def test_a1111(groups: list[Group], sizes: list[int]) -> None:
    chunks = a1111_chunks(groups, COMMA)
    assert [len(chunk) for chunk in chunks] == sizes
    assert [token for chunk in chunks for token in chunk] == [token for group in groups for token in group.tokens]


@pytest.mark.parametrize(
    ("groups", "sizes"),
    [([93], [75, 18]), ([70, 7], [70, 7]), ([70, 8], [75, 3]), ([74, 3, 5], [74, 8]), ([200], [75, 75, 50]), ([], [0])],
)
def test_comfyui(groups: list[int], sizes: list[int]) -> None:
    chunks = comfyui_chunks([words(count) for count in groups])
    assert [len(chunk) for chunk in chunks] == sizes
