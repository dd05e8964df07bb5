"""CLIP's vocabulary: text to token ids, without torch or transformers."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hires.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = 49_408
"""The size of the vocabulary that all published CLIP towers share."""
CLIP_LENGTH = 77
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """A byte-pair vocabulary of CLIP's kind."""

    path: Path
    tokenizer: Tokenizer
    size: int
    """How many words it has."""
    start: int
    """The id of the mark that begins a chunk."""
    end: int
    """The id of the mark that ends one."""
    length: int
    """The tokens of a chunk with its two marks."""
    comma: int | None
    """The id of a comma, None without one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without marks."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def pad(self, tower: int) -> int:
        """What fills a chunk: tower 1 repeats the end mark, SDXL's second tower takes id 0.

        OpenCLIP pads with 0 whatever a folder's tokenizer says; a vocabulary of its own has one tokenizer for both towers.
        """
        return 0 if tower == 1 and self.size == CLIP_WORDS else self.end


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary in a folder: vocab.json with merges.txt, else tokenizer.json. ModelError where it is damaged."""
    try:
        stamp = tuple((name, (folder / name).stat().st_mtime_ns) for name in _files(folder))
    except OSError as error:
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error}); download it again") from None
    return _read(folder, stamp)


def _files(folder: Path) -> tuple[str, ...]:
    pair = ("vocab.json", "merges.txt")
    return pair if all((folder / name).is_file() for name in pair) else ("tokenizer.json",)


@functools.lru_cache(maxsize=8)
def _read(folder: Path, stamp: tuple[tuple[str, int], ...]) -> Vocabulary:
    names = [name for name, _ in stamp]
    try:
        tokenizer = _byte_pairs(folder) if "vocab.json" in names else saved_tokenizer(folder / "tokenizer.json")
        config = folder / "tokenizer_config.json"
        told = json.loads(config.read_text()) if config.is_file() else {}
        length = min(int(told.get("model_max_length", CLIP_LENGTH)), CLIP_LENGTH)
        start, end, comma = (tokenizer.token_to_id(word) for word in (START, END, ",</w>"))
    except Exception as error:  # a damaged vocabulary is a bare Exception of the tokenizers library
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise ModelError(f"{folder}: the tokenizer cannot be loaded ({reason}); download it again") from error
    if start is None or end is None or length < 3:
        raise ModelError(f"{folder}: no vocabulary of CLIP (it lacks {START} or {END}); give `parts` that hold one")
    return Vocabulary(folder, tokenizer, tokenizer.get_vocab_size(), start, end, length, comma)


def saved_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without padding and truncation."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _byte_pairs(folder: Path) -> Tokenizer:
    """CLIP's own splitting of words (Radford et al. 2021, simple_tokenizer) over the folder's merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pairs = models.BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
    )
    tokenizer = Tokenizer(pairs)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([mark for mark in (START, END) if pairs.token_to_id(mark) is not None])
    return tokenizer
