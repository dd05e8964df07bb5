"""Prompt weights in both syntaxes: the table of `docs/guide/prompts.md`, row for row."""

from __future__ import annotations

import pytest

from hires.errors import RequestError
from hires.prompts.attention import Run, a1111_runs, comfyui_runs, read_runs

Pairs = list[tuple[str, float]]


def pairs(runs: list[Run]) -> Pairs:
    return [(run.text, round(run.weight, 6)) for run in runs]


@pytest.mark.parametrize(
    ("text", "a1111", "comfyui"),
    [
        ("(x)", [("x", 1.1)], [("x", 1.1)]),
        ("((x))", [("x", 1.21)], [("x", 1.21)]),
        ("[x]", [("x", 0.909091)], [("[x]", 1.0)]),
        ("(x:1.3)", [("x", 1.3)], [("x", 1.3)]),
        ("((a:1.5) b:1.2)", [("a", 1.8), (" b", 1.2)], [("a", 1.5), (" b", 1.2)]),
        ("((a:1.5))", [("a", 1.65)], [("a", 1.5)]),
        ("(a:b:1.2)", [("a:b", 1.2)], [("a:b", 1.2)]),
        ("(a:1.2 )", [("a:1.2 ", 1.1)], [("a", 1.2)]),
        ("(a:1e2)", [("a:1e2", 1.1)], [("a", 100.0)]),
        ("(a:inf)", [("a:inf", 1.1)], [("a", float("inf"))]),
        ("(a:foo)", [("a:foo", 1.1)], [("a:foo", 1.1)]),
        ("(:1.2)", [("", 1.0)], [(":1.2", 1.1)]),
        ("()", [("", 1.0)], []),
        ("(unbal", [("unbal", 1.1)], [("(unbal", 1.0)]),
        ("a) (b:1.3) c", [("a) ", 1.0), ("b", 1.3), (" c", 1.0)], [("a) (b:1.3) c", 1.0)]),
        (r"\( \) \[ \] \\ \x", [("( ) [ ] \\ x", 1.0)], [(r"( ) \[ \] \\ \x", 1.0)]),
        ("(a:-1) (b:0)", [("a", -1.0), (" ", 1.0), ("b", 0.0)], [("a", -1.0), (" ", 1.0), ("b", 0.0)]),
        ("(a BREAK b:1.2)", [("a", 1.2), ("BREAK", -1.2), ("b", 1.2)], [("a BREAK b", 1.2)]),
        ("a BREAK b", [("a", 1.0), ("BREAK", -1.0), ("b", 1.0)], [("a BREAK b", 1.0)]),
    ],
)
def test_the_table_of_weights(text: str, a1111: Pairs, comfyui: Pairs) -> None:
    assert pairs(a1111_runs(text)) == a1111
    assert pairs(comfyui_runs(text)) == comfyui


@pytest.mark.parametrize("syntax", ["a1111", "comfyui"])
@pytest.mark.parametrize("weight", ["1000000000", "-101"])
def test_a_weight_beyond_reason_is_refused_with_its_number(syntax: str, weight: str) -> None:
    with pytest.raises(RequestError, match=r"prompt weight .* of 'x': give one from -100 to 100"):
        read_runs(f"(x:{weight})", syntax)


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(RequestError, match=r"'1\.2\.3': is no number"):
        read_runs("(a:1.2.3)", "a1111")
    with pytest.raises(RequestError, match="weight inf"):
        read_runs("(a:inf)", "comfyui")
    assert read_runs("(a:1.2.3)", "comfyui") == [Run("a:1.2.3", 1.1)]


def test_without_syntax_brackets_are_words() -> None:
    assert read_runs("(a:1.3) [b] BREAK", "none") == [Run("(a:1.3) [b] BREAK")]
