"""Textual inversion: names in a prompt that stand for rows of an embedding file."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hires.errors import RequestError
from hires.prompts.attention import Run
from hires.prompts.chunks import Group, Token, Vector

EMBEDDING_ENDS = (".safetensors", ".pt", ".bin")
MARK = "embedding:"
_NAMED = re.compile(r"(?<!\S)embedding:(?P<name>[^\s:()\[\]]+)")
MOST_FILES = 10_000


@dataclass(frozen=True, slots=True)
class EmbeddingFile:
    """An embedding that a prompt may name."""

    name: str
    path: Path
    bundle: str = ""
    """What its keys start with in a LoRA file that brings it; empty for a file of its own."""
    state: tuple[int, int] = (0, 0)
    """Its file's bytes and time of change in ns, so that a changed file is another embedding."""

    @classmethod
    def of(cls, name: str, path: Path, bundle: str = "") -> EmbeddingFile:
        """The embedding as its file is now."""
        stat = path.stat()
        return cls(name, path, bundle, (stat.st_size, stat.st_mtime_ns))


def find_embeddings(folder: str | Path | None) -> dict[str, EmbeddingFile]:
    """The embeddings of a folder and its sub-folders by their file's stem, in lower case. RequestError for no folder."""
    if folder is None:
        return {}
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RequestError(f"embeddings {folder}: is not a folder; give the one that the embedding files are in")
    found: dict[str, EmbeddingFile] = {}
    for index, path in enumerate(sorted(root.rglob("*"))):
        if index >= MOST_FILES:
            raise RequestError(f"embeddings {folder}: holds more than {MOST_FILES} files; give the folder of the embeddings")
        if path.suffix in EMBEDDING_ENDS and path.is_file() and not path.name.startswith("."):
            found.setdefault(path.stem.lower(), EmbeddingFile.of(path.stem, path))
    return found


def named_embeddings(text: str) -> list[str]:
    """The names that a prompt writes after `embedding:`."""
    return [match["name"] for match in _NAMED.finditer(text)]


def look_up(name: str, known: Mapping[str, EmbeddingFile]) -> tuple[EmbeddingFile | None, str]:
    """The embedding of a name with or without its file's ending, and what of the name is text: a comma at its end."""
    for wanted in (name, name.rstrip(",.;!?")):
        stem = wanted.lower()
        stem = next((stem.removesuffix(end) for end in EMBEDDING_ENDS if stem.endswith(end)), stem)
        file = known.get(stem.rpartition("/")[2])
        if file is not None:
            return file, name[len(wanted) :]
    return None, name


Rows = Callable[[EmbeddingFile], int]
"""How many rows an embedding has for a tower; 0 where it has none that fit."""


class Placing:
    """Puts embeddings into the tokens of a prompt, for one tower.

    Args:
        known: the embeddings by name in lower case.
        rows: how many rows each has for the tower.
        encode: text to token ids.
        syntax: 'a1111', 'comfyui' or 'none'.
    """

    def __init__(
        self, known: Mapping[str, EmbeddingFile], rows: Rows, encode: Callable[[str], Sequence[int]], syntax: str
    ) -> None:
        self.known, self.rows, self.encode, self.syntax = known, rows, encode, syntax

    def groups(self, runs: Sequence[Run]) -> list[Group]:
        """The runs of a prompt as groups of tokens.

        `embedding:name` is an embedding in both syntaxes, and in A1111's a bare name is one as well, wherever its tokens are.
        What is not found, or has no rows for the tower, is text in A1111's syntax and left out in ComfyUI's.
        """
        groups: list[Group] = []
        for run in runs:
            groups += [Group((), breaks=True)] if run.breaks else self._of_run(run)
        return groups

    def _of_run(self, run: Run) -> list[Group]:
        groups, start = [], 0
        for match in _NAMED.finditer(run.text) if self.syntax != "none" else ():
            file, rest = look_up(match["name"], self.known)
            rows = 0 if file is None else self.rows(file)
            if not rows and self.syntax == "a1111":
                continue
            groups += self._text(run.text[start : match.start()], run.weight)
            if file is not None and rows:
                groups.append(self._vectors(file, rows, run.weight))
            start = match.end() - len(rest) if file is not None else match.end()
        return groups + self._text(run.text[start:], run.weight)

    def _text(self, text: str, weight: float) -> list[Group]:
        ids = list(self.encode(text))
        if self.syntax != "a1111" or not self.known:
            return [Group(tuple(Token(number, weight) for number in ids))] if ids else []
        groups: list[Group] = []
        words: list[Token] = []
        place = 0
        while place < len(ids):
            file, length = self._match(ids, place)
            rows = 0 if file is None else self.rows(file)
            if file is None or not rows:
                words.append(Token(ids[place], weight))
                place += 1
                continue
            groups += [Group(tuple(words)), self._vectors(file, rows, weight)]
            words, place = [], place + length
        return [group for group in (*groups, Group(tuple(words))) if group.tokens]

    @functools.cached_property
    def _names(self) -> dict[int, list[tuple[list[int], EmbeddingFile]]]:
        """The names' ids by the first of them, longest names first."""
        names: dict[int, list[tuple[list[int], EmbeddingFile]]] = {}
        for file in self.known.values():
            ids = list(self.encode(file.name))
            if ids:
                names.setdefault(ids[0], []).append((ids, file))
        for same in names.values():
            same.sort(key=lambda pair: -len(pair[0]))
        return names

    def _match(self, ids: list[int], place: int) -> tuple[EmbeddingFile | None, int]:
        for wanted, file in self._names.get(ids[place], ()):
            if ids[place : place + len(wanted)] == wanted:
                return file, len(wanted)
        return None, 0

    @staticmethod
    def _vectors(file: EmbeddingFile, rows: int, weight: float) -> Group:
        return Group(tuple(Token(0, weight, Vector(file.name, row)) for row in range(rows)), whole=True)
