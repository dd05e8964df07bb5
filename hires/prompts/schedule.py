"""Reads A1111's scheduling, `[a:b:0.5]` and `[a|b]`, and `AND`: the texts of every step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hires.errors import RequestError

_NUMBER = re.compile(r"\s*([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)\s*\]")
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+", re.DOTALL)
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
MOST_PARTS = 64
"""Prompts that AND puts together; each is an evaluation more per step."""
DEEPEST = 50
"""Brackets in brackets that are read; deeper ones are words."""


LATEST = 1e9
"""A step beyond any; numbers beyond it, which may be infinite, are the same."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One stage of a render: the base picture is stage 0, each refinement one more."""

    index: int
    steps: int
    before: int = 0
    """Steps of all stages before it."""

    def last_step(self, written: str) -> int:
        """The last step of this stage that a number of a schedule allows for the text before it.

        Written with a point it is a share of the stage's steps, 1.0 to 2.0 being that of the second stage; without one, a
        step counted over all stages. Below 1 for a number that is over when the stage begins.
        """
        value = min(max(float(written), -LATEST), LATEST)
        return min(self.steps, int((value - self.index) * self.steps if "." in written else value - self.before))


Piece = Callable[[int, Pass], str]
"""The text of a part of a prompt at a step, counted from 1."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A prompt whose text changes from step to step."""

    pieces: tuple[Piece, ...]
    changes: bool
    """Whether there is a schedule at all."""

    def texts(self, stage: Pass) -> list[str]:
        """The text of every step of a stage."""
        if not self.changes:
            return ["".join(piece(1, stage) for piece in self.pieces)] * stage.steps
        return ["".join(piece(step, stage) for piece in self.pieces) for step in range(1, stage.steps + 1)]


def read_schedule(text: str) -> Scheduled:
    """The schedule of a prompt; one that cannot be read whole is the same text at every step, as in A1111."""
    reader = _Reader(text)
    pieces: list[Piece] = []
    while reader.place < len(text):
        inside = reader.prompt()
        if inside:
            pieces += inside
        elif text[reader.place] == "|" or text[reader.place] == "\\":  # a stray bar or a backslash at the end
            return Scheduled((_constant(text),), changes=False)
        else:
            pieces.append(_constant(text[reader.place]))
            reader.place += 1
    return Scheduled(tuple(pieces), changes=reader.schedules > 0)


def _constant(text: str) -> Piece:
    return lambda step, stage: text


class _Reader:
    """Reads a prompt from left to right; what cannot be read as a bracket leaves `place` where it was."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth, self.schedules = text, 0, 0, 0
        self._failed: set[int] = set()

    def prompt(self) -> list[Piece]:
        """Text and whole brackets up to the first character that is neither."""
        pieces: list[Piece] = []
        while True:
            plain = _PLAIN.match(self.text, self.place)
            if plain:
                pieces.append(_constant(plain[0]))
                self.place = plain.end()
                continue
            bracket = self._bracket()
            if bracket is None:
                return pieces
            pieces += bracket

    def _bracket(self) -> list[Piece] | None:
        start, found, schedules = self.place, None, self.schedules
        if start in self._failed or self.depth >= DEEPEST or self.text[start : start + 1] not in ("(", "["):
            return None
        self.depth += 1
        self.place += 1
        found = self._round() if self.text[start] == "(" else self._square()
        self.depth -= 1
        if found is None:
            self.place, self.schedules = start, schedules
            self._failed.add(start)
        return found

    def _take(self, mark: str) -> bool:
        there = self.text.startswith(mark, self.place)
        self.place += len(mark) if there else 0
        return there

    def _round(self) -> list[Piece] | None:
        inside = self.prompt()
        if self._take(":"):
            inside += [_constant(":"), *self.prompt()]
        return [_constant("("), *inside, _constant(")")] if self._take(")") else None

    def _square(self) -> list[Piece] | None:
        first = self.prompt()
        if self._take("]"):
            return [_constant("["), *first, _constant("]")]
        if self.text.startswith("|", self.place):
            options = [first]
            while self._take("|"):
                options.append(self.prompt())
            return self._counted(_alternating(options)) if self._take("]") else None
        if not self._take(":"):
            return None
        number = _NUMBER.match(self.text, self.place)
        if number is None:
            second = self.prompt()
            number = _NUMBER.match(self.text, self.place) if self._take(":") else None
            before, after = first, second
        else:
            before, after = [], first
        if number is None:
            return None
        self.place = number.end()
        return self._counted(_switching(before, after, number[1]))

    def _counted(self, piece: Piece) -> list[Piece]:
        self.schedules += 1
        return [piece]


def _text_of(pieces: list[Piece], step: int, stage: Pass) -> str:
    return "".join(piece(step, stage) for piece in pieces)


def _alternating(options: list[list[Piece]]) -> Piece:
    return lambda step, stage: _text_of(options[(step - 1) % len(options)], step, stage)


def _switching(before: list[Piece], after: list[Piece], written: str) -> Piece:
    return lambda step, stage: _text_of(before if step <= stage.last_step(written) else after, step, stage)


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt of several that AND puts together."""

    text: str
    weight: float = 1.0


def split_and(prompt: str) -> list[Part]:
    """The prompts that the word AND puts together, each with the weight after its last colon; a prompt without it is one.

    RequestError for a weight beyond 100 or more than `MOST_PARTS`.
    """
    texts = _AND.split(prompt)
    if len(texts) == 1:
        return [Part(prompt)]
    if len(texts) > MOST_PARTS:
        raise RequestError(
            f"prompt: AND puts {len(texts)} prompts together, each an estimate more per step; give at most {MOST_PARTS}"
        )
    parts = []
    for text in texts:
        before, colon, written = text.rpartition(":")
        weighted = bool(colon) and _WEIGHT.fullmatch(written.strip()) is not None
        weight = float(written) if weighted else 1.0
        if abs(weight) > 100:
            raise RequestError(f"AND weight {weight:g}: give one from -100 to 100")
        parts.append(Part((before if weighted else text).strip(), weight))
    return parts
