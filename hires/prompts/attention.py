"""Reads prompt weights, `(x:1.3)`, in the syntax of A1111 or of ComfyUI."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from hires.errors import RequestError

ROUND, SQUARE = 1.1, 1 / 1.1
"""What a bracket of either kind multiplies a weight by."""
LARGEST_WEIGHT = 100.0
DEEPEST = 100
"""Brackets of a kind that may be open at once; 49 round ones weigh more than `LARGEST_WEIGHT` already."""
BREAK_WEIGHT = -1.0
"""The weight by which A1111 marks the word BREAK; a bracket around the word changes it, and it is a word again."""
_TOKEN = re.compile(r"\\(?P<escaped>[()\[\]\\])|\\|(?P<open>[(\[])|:(?P<weight>[-+]?[\d.]+)\)|(?P<close>[)\]])|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of text with one weight."""

    text: str
    weight: float = 1.0

    @property
    def breaks(self) -> bool:
        """Whether it ends a chunk of tokens instead of being encoded."""
        return self.text == "BREAK" and self.weight == BREAK_WEIGHT


def read_runs(text: str, syntax: str) -> list[Run]:
    """The runs of a text in a syntax: 'a1111', 'comfyui' or 'none'. RequestError for a weight that is no usable number."""
    runs = {"a1111": a1111_runs, "comfyui": comfyui_runs}.get(syntax, lambda plain: [Run(plain)])(text)
    for run in runs:
        if not (math.isfinite(run.weight) and abs(run.weight) <= LARGEST_WEIGHT):
            raise RequestError(
                f"prompt weight {run.weight:g} of {run.text[:40]!r}: give one from {-LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            )
    return runs


def a1111_runs(text: str) -> list[Run]:
    """A1111's weights: `(x)` times 1.1, `[x]` divided by 1.1, `(x:1.3)` times 1.3, a backslash before a bracket for itself.

    Brackets multiply; those that never close end with the text. BREAK is a run of its own.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _TOKEN.finditer(text):
        token = match[0]
        if match["open"]:
            opened[token].append(len(texts))
            _check_depth(len(opened[token]))
        elif match["weight"] and opened["("]:
            scale(opened["("].pop(), _number(match["weight"], token))
        elif token == ")" and opened["("]:
            scale(opened["("].pop(), ROUND)
        elif token == "]" and opened["["]:
            scale(opened["["].pop(), SQUARE)
        else:
            for index, part in enumerate(_around_breaks(match["escaped"] or ("" if token == "\\" else token))):
                texts += ["BREAK", part] if index else [part]
                weights += [BREAK_WEIGHT, 1.0] if index else [1.0]
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            scale(start, factor)
    return _joined(texts, weights)


def _around_breaks(text: str) -> list[str]:
    """A text cut at each BREAK, without the spaces around the word."""
    parts = _BREAK.split(text)
    ended = [*(part.rstrip() for part in parts[:-1]), parts[-1]]
    return [ended[0], *(part.lstrip() for part in ended[1:])]


def _number(digits: str, token: str) -> float:
    try:
        return float(digits)
    except ValueError:
        raise RequestError(f"prompt weight {token[1:-1]!r}: is no number; write one such as (word:1.2)") from None


def _check_depth(depth: int) -> None:
    if depth > DEEPEST:
        raise RequestError(
            f"prompt of more than {DEEPEST} brackets open at once: close them, or give a weight such as (word:1.2)"
        )


def _joined(texts: list[str], weights: list[float]) -> list[Run]:
    """Runs whose neighbours differ in weight."""
    runs: list[Run] = []
    for text, weight in zip(texts, weights, strict=True):
        if runs and runs[-1].weight == weight:
            runs[-1] = Run(runs[-1].text + text, weight)
        else:
            runs.append(Run(text, weight))
    return runs or [Run("")]


def comfyui_runs(text: str) -> list[Run]:
    r"""ComfyUI's weights: `(x)` times 1.1, `(x:1.3)` replaces by 1.3, `\(` for a bracket itself; square brackets are words."""
    hidden = text.replace("\\)", "\0").replace("\\(", "\1")
    return [Run(run.text.replace("\0", ")").replace("\1", "("), run.weight) for run in _nested(hidden, 1.0, 1)]


def _nested(text: str, weight: float, depth: int) -> Iterator[Run]:
    _check_depth(depth)
    for part in _outermost(text):
        if not (len(part) >= 2 and part[0] == "(" and part[-1] == ")"):
            yield Run(part, weight)
            continue
        inner, own = part[1:-1], weight * ROUND
        colon = inner.rfind(":")
        if colon > 0:
            try:
                inner, own = inner[:colon], float(inner[colon + 1 :])
            except ValueError:
                inner = part[1:-1]
        yield from _nested(inner, own, depth + 1)


def _outermost(text: str) -> list[str]:
    """The text cut before and after its outermost brackets; one that closes too early hides those after it, as there."""
    parts, start, depth = [], 0, 0
    for index, character in enumerate(text):
        if character == "(":
            if depth == 0:
                parts.append(text[start:index])
                start = index
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[start : index + 1])
                start = index + 1
    return [part for part in (*parts, text[start:]) if part]
