"""Cuts the tokens of a prompt into CLIP's chunks of 75, as A1111 or as ComfyUI does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hires.prompts.attention import Run

CONTENT = 75
"""Tokens of a chunk between its two marks."""
COMMA_BACKTRACK = 20
"""How many tokens after a comma go to the next chunk with it, in A1111."""
WHOLE_GROUP = 8
"""A group of fewer tokens than this is not cut in two, in ComfyUI."""


@dataclass(frozen=True, slots=True)
class Vector:
    """A row of an embedding that stands in a token's place."""

    embedding: str
    row: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a prompt; with a vector, its id is a placeholder."""

    id: int
    weight: float = 1.0
    vector: Vector | None = None


Chunk = tuple[Token, ...]
"""Up to 75 tokens, without marks and padding."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens that stay together where they can: a run of text, or an embedding."""

    tokens: tuple[Token, ...]
    breaks: bool = False
    """Whether it is no text but the end of a chunk."""
    whole: bool = False
    """Whether it is one embedding, which is never cut."""


@dataclass(slots=True)
class _Chunks:
    """Chunks that are being filled."""

    size: int
    done: list[Chunk] = field(default_factory=list)
    open: list[Token] = field(default_factory=list)
    comma: int = -1
    """The place of the last comma in the open chunk, -1 without one."""

    def end(self) -> None:
        """Close the open chunk."""
        self.done.append(tuple(self.open))
        self.open, self.comma = [], -1

    def finished(self) -> list[Chunk]:
        """All chunks; at least one."""
        if self.open or not self.done:
            self.end()
        return self.done


def a1111_chunks(groups: Iterable[Group], comma: int | None, size: int = CONTENT) -> list[Chunk]:
    """Chunks by A1111's rule: BREAK ends one, and what follows a comma among its last 20 tokens goes to the next.

    comma: the id of the token ',', None for a vocabulary without it. An embedding that no longer fits ends the chunk first.
    """
    chunks = _Chunks(size)
    for group in groups:
        if group.breaks:
            chunks.end()
        elif group.whole:
            if len(chunks.open) + len(group.tokens) > size:
                chunks.end()
            chunks.open += group.tokens
        else:
            for token in group.tokens:
                _add(chunks, token, token.vector is None and token.id == comma)
    return chunks.finished()


def _add(chunks: _Chunks, token: Token, comma: bool) -> None:
    full = len(chunks.open) == chunks.size
    if comma:
        chunks.comma = len(chunks.open)
    elif full and chunks.comma != -1 and len(chunks.open) - chunks.comma <= COMMA_BACKTRACK:
        moved = chunks.open[chunks.comma + 1 :]
        del chunks.open[chunks.comma + 1 :]
        chunks.end()
        chunks.open = moved
        full = len(moved) == chunks.size
    if full:
        chunks.end()
    chunks.open.append(token)


def comfyui_chunks(groups: Iterable[Group], size: int = CONTENT) -> list[Chunk]:
    """Chunks by ComfyUI's rule: a group of fewer than 8 tokens that does not fit goes to the next one whole."""
    chunks = _Chunks(size)
    for group in groups:
        rest, cut = group.tokens, len(group.tokens) >= WHOLE_GROUP
        while rest:
            room = size - len(chunks.open)
            if len(rest) <= room:
                chunks.open += rest
                break
            if cut:
                chunks.open += rest[:room]
                rest = rest[room:]
            chunks.end()
    return chunks.finished()


def groups_of(runs: Sequence[Run], encode: Callable[[str], Sequence[int]]) -> list[Group]:
    """The runs of a prompt as groups of tokens, each run encoded on its own; without embeddings."""
    return [
        Group((), breaks=True) if run.breaks else Group(tuple(Token(number, run.weight) for number in encode(run.text)))
        for run in runs
    ]
