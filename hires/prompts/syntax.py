"""What is told about a prompt: what its syntax does, and what of it is no syntax here."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hires.errors import RequestError
from hires.prompts.attention import a1111_runs, comfyui_runs
from hires.prompts.embeddings import look_up, named_embeddings
from hires.prompts.schedule import read_schedule, split_and
from hires.prompts.script import Prompts
from hires.prompts.tags import without_comments

_NUMBERED = re.compile(r"(?<!\\)\([^()]*:\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)")
_SYNTAX = re.compile(r"(?<!\\)[()\[\]]|\bBREAK\b|\bAND\b|(?<!\S)embedding:")
_LOOSE_NUMBER = re.compile(r":([^\\:()\[\]]+)\)")
_WEIGHT = re.compile(r"[-+]?[\d.]+")
_BARE_SCHEDULE = re.compile(r"\[[^\[\]:|]*[:|][^\[\]]*\]")


def resolve_syntax(asked: str | None, words_only: bool, prompts: tuple[str, ...], model: str) -> str:
    """The syntax that prompts are read in, by default A1111's.

    words_only: for a model that takes no weights, T5's or the shipped one. RequestError where the syntax was asked for
    there, or a prompt holds a weight such as (word:1.3).
    """
    if not words_only:
        return asked or "a1111"
    if asked not in (None, "none"):
        raise RequestError(f"prompt_syntax {asked}: {model} takes whole sentences without weights; leave it out")
    for prompt in prompts if asked is None else ():
        match = _NUMBERED.search(prompt)
        if match:
            raise RequestError(
                f"prompt weight {match[0][:60]!r}: {model} takes no weights; write what matters first, or give "
                f"`prompt_syntax` none to have it read as words"
            )
    return "none"


def has_words(prompts: Prompts) -> bool:
    """Whether a prompt holds BREAK or AND."""
    return any(re.search(r"\b(?:BREAK|AND)\b", text) for _, text in _all_texts(prompts))


def words_note(prompts: tuple[str, ...], model: str) -> str | None:
    """A note on syntax that a model which takes no weights reads as words; None without any."""
    found = dict.fromkeys(match[0] for prompt in prompts for match in _SYNTAX.finditer(prompt))
    if not found:
        return None
    return f"{model} takes no prompt syntax: {' '.join(found)} are words of the prompt"


def notes(prompts: Prompts) -> Iterator[str]:
    """What a plan says about the syntax of its prompts."""
    known = {file.name.lower(): file for file in prompts.embeddings}
    for which, text in _all_texts(prompts):
        for name in named_embeddings(text) if prompts.syntax != "none" else ():
            if look_up(name, known)[0] is None:
                outcome = "read as words, as in A1111" if prompts.syntax == "a1111" else "left out, as in ComfyUI"
                yield f"{which}: embedding:{name[:60]} is not among the embeddings; {outcome}"
        if prompts.syntax == "a1111":
            yield from _a1111_notes(which, text)
        elif prompts.syntax == "comfyui":
            yield from _comfyui_notes(which, text)


def _all_texts(prompts: Prompts) -> list[tuple[str, str]]:
    texts = {
        "prompt": prompts.positive,
        "negative": prompts.negative,
        "prompt_l": prompts.positive_l,
        "negative_l": prompts.negative_l,
    }
    return [(which, text) for which, text in texts.items() if text]


def _a1111_notes(which: str, prompt: str) -> Iterator[str]:
    text = without_comments(prompt)
    if text != prompt:
        yield f"{which}: what follows a # is a comment"
    parts = split_and(text) if which == "prompt" else []
    if len(parts) > 1:
        weights = ", ".join(f"{part.weight:g}" for part in parts)
        yield f"{which}: {len(parts)} prompts put together by AND with weights {weights}, each an estimate more per step"
        empty = sum(not part.text for part in parts)
        if empty:
            yield f"{which}: {empty} of the prompts around AND are empty and pull to no text at all"
    if _BARE_SCHEDULE.search(text) and not read_schedule(text).changes:
        yield f"{which}: no schedule can be read in it, so its brackets are weights"
    unclosed, unopened = _unbalanced(text)
    if unclosed:
        yield f"{which}: {unclosed} of its brackets never close and weigh the rest of the prompt"
    if unopened:
        yield f"{which}: {unopened} of its closing brackets open nowhere and are words"
    for match in _LOOSE_NUMBER.finditer(text):
        if _is_number(match[1]) and not _WEIGHT.fullmatch(match[1]):
            yield f"{which}: ':{match[1][:40]})' is no weight but words, as in A1111; write a number such as (word:1.3)"
    if any(run.text == "BREAK" and not run.breaks for run in a1111_runs(text)):
        yield f"{which}: a BREAK within brackets is a word, as in A1111; put it outside"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _comfyui_notes(which: str, text: str) -> Iterator[str]:
    words = [word for word in ("BREAK", "AND") if re.search(rf"\b{word}\b", text)]
    if re.search(r"(?<!\\)[\[\]]", text):
        words.append("square brackets")
    if words:
        yield f"{which}: {', '.join(words)} are words in ComfyUI's syntax"
    weighted = any(run.weight != 1.0 for run in comfyui_runs(text))
    if any(_unbalanced(text)) and not weighted:
        yield f"{which}: its brackets do not match, and none of them weighs anything"


def _unbalanced(text: str) -> tuple[int, int]:
    """How many brackets never close, and how many close without being opened; those after a backslash are no brackets."""
    opened = {"(": 0, "[": 0}
    unopened = 0
    for match in re.finditer(r"\\.|[()\[\]]", text, re.DOTALL):
        mark = match[0]
        if mark in opened:
            opened[mark] += 1
        elif mark in (")", "]"):
            pair = "(" if mark == ")" else "["
            unopened += opened[pair] == 0
            opened[pair] = max(0, opened[pair] - 1)
    return sum(opened.values()), unopened
