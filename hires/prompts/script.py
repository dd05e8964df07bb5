"""Which text applies at which step of a render."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hires.errors import RequestError
from hires.prompts.embeddings import EmbeddingFile
from hires.prompts.schedule import Part, Pass, read_schedule, split_and
from hires.prompts.tags import without_comments


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """One text to encode, and the rules by which it is read."""

    text: str
    text_l: str | None = None
    """What CLIP-L reads instead, where there are two towers."""
    syntax: str = "none"
    """a1111, comfyui or none."""
    clip_skip: int | None = None
    """Which of CLIP's last layers gives the states: 1 the last, 2 the one before; None for the model's own."""
    embeddings: tuple[EmbeddingFile, ...] = ()
    """Those whose name is in a text."""
    cut: bool = False
    """Whether the model reads one chunk and no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The prompts of a request and the rules by which they are read."""

    positive: str
    negative: str = ""
    positive_l: str | None = None
    negative_l: str | None = None
    syntax: str = "none"
    clip_skip: int | None = None
    embeddings: tuple[EmbeddingFile, ...] = ()
    """All that there are."""
    cut: bool = False
    """Whether the model reads one chunk and no more."""

    def wording(self, text: str, text_l: str | None) -> Wording:
        """A text with the rules, and the embeddings whose name it holds."""
        words = " ".join(f"{text} {text_l or ''}".lower().split())
        named = tuple(file for file in self.embeddings if " ".join(file.name.lower().split()) in words)
        return Wording(text=text, text_l=text_l, syntax=self.syntax, clip_skip=self.clip_skip, embeddings=named, cut=self.cut)


@dataclass(frozen=True, slots=True)
class Step:
    """What one step is drawn from."""

    positive: tuple[tuple[int, float], ...]
    """The texts that AND puts together, each with its weight, by their place in `Script.texts`."""
    negative: int
    """The text of the negative prompt."""


PLAIN_STEP = Step(((0, 1.0),), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """The texts of a render, and the steps that each applies to."""

    texts: tuple[Wording, ...]
    """The prompt and the negative prompt of the first step, then all others."""
    stages: Mapping[str, tuple[Step, ...]] = field(default_factory=dict)
    """The steps of each stage by its name."""

    @property
    def plain(self) -> bool:
        """Whether every step is drawn from the first two texts."""
        return all(step == PLAIN_STEP for steps in self.stages.values() for step in steps)

    def steps(self, stage: str) -> tuple[Step, ...]:
        """The steps of a stage; a single plain one for a stage that the script does not know."""
        return self.stages.get(stage) or (PLAIN_STEP,)


def write_script(prompts: Prompts, stages: Sequence[tuple[str, int]]) -> Script:
    """The script of prompts for stages, each a name and its steps. RequestError for a prompt that cannot be read."""
    parts = positive_parts(prompts)
    rows = []
    before = 0
    for index, (name, steps) in enumerate(stages):
        stage = Pass(index, steps, before)
        before += steps
        rows.append((name, _wordings(prompts, parts, stage)))
    places: dict[Wording, int] = {}
    first = rows[0][1][0]
    texts = [first[0][0], first[1]]
    for place, text in enumerate(texts):
        places.setdefault(text, place)

    def place_of(text: Wording) -> int:
        if text not in places:
            places[text] = len(texts)
            texts.append(text)
        return places[text]

    weights = [part.weight for part in parts]
    script: dict[str, tuple[Step, ...]] = {}
    for name, row in rows:
        steps_of = []
        for positives, negative in row:
            positive = tuple((place_of(text), weight) for text, weight in zip(positives, weights, strict=True))
            steps_of.append(Step(positive, 1 if negative == texts[1] else place_of(negative)))
        script[name] = tuple(steps_of)
    return Script(texts=tuple(texts), stages=script)


def positive_parts(prompts: Prompts) -> list[Part]:
    """What AND puts together in the prompt, in A1111's syntax; one part in the others."""
    if prompts.syntax != "a1111":
        return [Part(prompts.positive)]
    parts = split_and(without_comments(prompts.positive))
    if prompts.positive_l is not None and (len(parts) > 1 or len(split_and(prompts.positive_l)) > 1):
        raise RequestError("prompt_l: cannot stand beside AND, which puts whole prompts together; leave one of the two out")
    return parts


def _wordings(prompts: Prompts, parts: Sequence[Part], stage: Pass) -> list[tuple[list[Wording], Wording]]:
    """The texts of the parts and of the negative prompt at every step of a stage."""
    positives = [_texts(prompts, part.text, stage) for part in parts]
    l_texts = _optional_texts(prompts, prompts.positive_l, stage)
    negatives, l_negatives = _texts(prompts, prompts.negative, stage), _optional_texts(prompts, prompts.negative_l, stage)
    return [
        (
            [prompts.wording(texts[step], l_texts[step]) for texts in positives],
            prompts.wording(negatives[step], l_negatives[step]),
        )
        for step in range(stage.steps)
    ]


def _texts(prompts: Prompts, text: str, stage: Pass) -> list[str]:
    if prompts.syntax != "a1111":
        return [text] * stage.steps
    return read_schedule(without_comments(text)).texts(stage)


def _optional_texts(prompts: Prompts, text: str | None, stage: Pass) -> list[str | None]:
    return [None] * stage.steps if text is None else [*_texts(prompts, text, stage)]


def step_at(levels: Sequence[float], sigma: float) -> int:
    """The step that an evaluation at noise level sigma belongs to, from 0; levels: those of the stage, falling, 0 last."""
    rising = [-level for level in levels[:-1]]
    return max(0, bisect.bisect_right(rising, -sigma * (1 - 1e-6)) - 1)
