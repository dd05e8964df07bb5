"""Cuts comments and `<lora:name:0.8>` tags out of prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from hires.errors import RequestError, unknown
from hires.options.lora import LoraRef

_TAG = re.compile(r"<(?P<kind>\w+):(?P<inside>[^>]*)>")
_COMMENT = re.compile(r"#[^\n]*")
LORA_ENDS = (".safetensors", ".pt", ".ckpt", ".bin")
KINDS = ("lora", "lyco")
LONGEST = 50_000
"""Characters of a prompt, twice what the longest that is encoded takes."""


def check_lengths(prompts: Iterable[str | None]) -> None:
    """RequestError for a prompt of more than `LONGEST` characters."""
    for prompt in prompts:
        if prompt is not None and len(prompt) > LONGEST:
            raise RequestError(f"prompt of {len(prompt)} characters, {prompt[:40]!r} ...: give at most {LONGEST}")


def without_comments(prompt: str) -> str:
    """The prompt without what follows a # up to the end of its line, as in A1111."""
    return _COMMENT.sub("", prompt)


def cut_tags(prompt: str, lora_of: Callable[[str], LoraRef], commented: bool) -> tuple[str, tuple[LoraRef, ...]]:
    """The prompt without its tags, and their LoRAs in order.

    lora_of: the LoRA of what stands inside a tag after its colon. commented: whether a # begins a comment, whose tags stay
    where they are. RequestError for a tag of another kind, such as hypernet.
    """
    loras: list[LoraRef] = []

    def take(match: re.Match[str]) -> str:
        if commented and "#" in prompt[prompt.rfind("\n", 0, match.start()) + 1 : match.start()]:
            return match[0]
        if match["kind"] not in KINDS:
            raise RequestError(f"prompt tag {match[0][:60]}: only <lora:name:scale> is known; leave it out")
        loras.append(lora_of(match["inside"]))
        return ""

    return _TAG.sub(take, prompt), tuple(loras)


def check_no_tag(prompts: Iterable[str], model: str) -> None:
    """RequestError for a tag behind a # on a model whose prompts hold no comments."""
    for prompt in prompts:
        match = _TAG.search(prompt)
        if match and match["kind"] in KINDS:
            raise RequestError(
                f"prompt tag {match[0][:60]}: stands behind a #, which begins no comment for {model}; put it first"
            )


def find_lora(name: str, folder: str | Path | None) -> Path:
    """The file of a LoRA's name in a folder or its sub-folders. RequestError where there is none, with names that are alike."""
    if folder is None:
        raise RequestError(f"prompt tag <lora:{name[:60]}>: give the folder that it is in with `lora_dir`")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RequestError(f"lora_dir {folder}: is not a folder; give the one that the LoRA files are in")
    files = {path.stem: path for path in sorted(root.rglob("*"), reverse=True) if path.suffix in LORA_ENDS and path.is_file()}
    for wanted in (name, next((name.removesuffix(end) for end in LORA_ENDS if name.endswith(end)), name)):
        if wanted in files:
            return files[wanted]
    raise RequestError(f"prompt tag <lora:{name[:60]}>: {unknown('LoRA', name[:60], sorted(files))} (in {folder})")
