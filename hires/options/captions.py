"""Cleans captions as PixArt's training captions were cleaned.

Imports no torch.
"""

from __future__ import annotations

import html
import re

from hires.errors import RequestError

_STEPS = (
    (r"<[^<>]{0,200}>", " "),  # tags
    (r"\b(?:https?://|www\.)\S+", " "),
    (r"\S+@\S+\.\S+", " "),  # addresses
    (r"@[\w\d]+\b", " "),
    (r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+", " "),  # scripts that T5 v1.1 has no words for
    (r"[‐-―−]", "-"),
    (r"[‘’`´]", "'"),
    (r"[“”«»„]", '"'),
    (r"#\d+\b|\b\d{6,}\b", " "),  # numbers of catalogues
    (r"\b\S+\.(?:jpe?g|png|webp|gif|bmp)\b", " "),
    (r"\.{2,}", "."),
    (r"\s+", " "),
)


def clean(prompt: str) -> str:
    """A prompt in lower case without tags, links, addresses, catalogue numbers and East Asian scripts.

    RequestError where more than half of its letters would be lost: T5 would be given another prompt.
    """
    text = html.unescape(html.unescape(prompt)).lower()
    for pattern, put in _STEPS:
        text = re.sub(pattern, put, text)
    text = text.strip(" -_|,;")
    before, after = (sum(letter.isalpha() for letter in words) for words in (prompt, text))
    if 2 * after < before:
        raise RequestError(
            f"clean_caption: would delete {before - after} of the prompt's {before} letters "
            f"({prompt[:40]!r} becomes {text[:40]!r}): "
            f"leave `clean_caption` out, or write the prompt in English"
        )
    return text
