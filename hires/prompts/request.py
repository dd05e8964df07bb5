"""Reads the prompts of a request for a model: syntax, embeddings, what a plan says about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hires.errors import RequestError
from hires.options.render import RenderRequest
from hires.prompts import syntax
from hires.prompts.attention import read_runs
from hires.prompts.embeddings import EmbeddingFile, find_embeddings
from hires.prompts.script import Prompts, Wording, positive_parts, write_script
from hires.prompts.tags import check_no_tag

MOST_CHUNKS = 64
"""Chunks of a text: 4,800 tokens, beyond which a prompt is no prompt."""
ANY_STEPS = (("base", 24), ("later", 24))
"""Steps of stages in which every text of a schedule has its turn, for the counts of a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """What a model reads its prompts with."""

    name: str
    """Its family, for messages."""
    towers: int
    """CLIP towers: two, one, or none for T5."""
    words_only: bool = False
    """Whether it takes no weights and no other syntax."""
    sized: bool = False
    """Whether it is told sizes (SDXL)."""
    edits: bool = False
    """Whether it edits a picture, with three estimates per step."""


def read_prompts(request: RenderRequest, model: TextModel, bundled: Sequence[EmbeddingFile] = ()) -> Prompts:
    """The prompts of a request as this model reads them. RequestError for what it cannot read.

    bundled: embeddings that come with the request's LoRAs; one of the folder with the same name comes first.
    """
    texts = tuple(text for text in (request.prompt, request.negative, request.prompt_l, request.negative_l) if text)
    check_options(request, model)
    if model.words_only and request.prompt_syntax is None:
        check_no_tag(texts, model.name)
    embeddings = {file.name.lower(): file for file in bundled} | find_embeddings(request.embeddings)
    return Prompts(
        positive=request.prompt,
        negative=request.negative,
        positive_l=request.prompt_l,
        negative_l=request.negative_l,
        syntax=syntax.resolve_syntax(request.prompt_syntax, model.words_only, texts, model.name),
        clip_skip=request.clip_skip,
        embeddings=tuple(embeddings.values()),
        cut=model.words_only,
    )


def check_options(request: RenderRequest, model: TextModel) -> None:
    """RequestError for an option of prompts that this model has no place for."""
    if request.clip_skip is not None and not model.towers:
        raise RequestError(f"clip_skip {request.clip_skip}: {model.name} reads prompts with T5; leave it out")
    for option in ("prompt_l", "negative_l"):
        if getattr(request, option) is not None and model.towers < 2:
            raise RequestError(f"{option}: {model.name} has no second text tower beside CLIP-L; leave it out")
    for option in ("original_size", "target_size", "crop"):
        if getattr(request, option) is not None and not model.sized:
            raise RequestError(f"{option} {getattr(request, option)}: {model.name} is told no sizes; leave it out")


def prompt_notes(request: RenderRequest, prompts: Prompts, model: TextModel) -> Iterator[str]:
    """What a plan says about the prompts. RequestError for a prompt that cannot be read."""
    if model.words_only and request.prompt_syntax is None:
        note = syntax.words_note((prompts.positive, prompts.negative), model.name)
        yield from () if note is None else (note,)
        return
    if model.edits and len(positive_parts(prompts)) > 1:
        raise RequestError("prompt: AND puts several estimates together, and an edit has three of its own; write one prompt")
    yield from syntax.notes(prompts)
    if request.clean_caption and syntax.has_words(prompts):
        yield "clean_caption: writes everything in lower case, so BREAK and AND are words"
    if prompts.clip_skip is not None and model.towers == 2 and prompts.syntax == "a1111":
        yield (
            f"clip_skip {prompts.clip_skip}: has no effect on SDXL in A1111's syntax, its layer before the last is what the "
            f"network knows; `prompt_syntax` comfyui takes another"
        )


def longest_text(prompts: Prompts, count: Callable[[Wording], int]) -> int:
    """The most chunks that a text of the prompts takes, texts of all steps included.

    count: the chunks of a text. RequestError for a text of more than `MOST_CHUNKS`, or a weight that is no usable number.
    """
    script = write_script(prompts, ANY_STEPS)
    for text in script.texts:
        for words in (text.text, text.text_l):
            read_runs(words or "", text.syntax)
    most = max(count(text) for text in script.texts)
    if most > MOST_CHUNKS:
        raise RequestError(f"prompt of {most} chunks of 75 tokens: give at most {MOST_CHUNKS}")
    return most
