"""Writes and reads A1111's "parameters" text, which tells how a picture was made."""

from __future__ import annotations

import re
from collections.abc import Mapping

NEGATIVE = "Negative prompt: "
PAIR = re.compile(r'\s*([\w][\w /+.-]*?):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
LEAST_PAIRS = 3  # a last line with fewer is part of the prompt


def written(prompt: str, negative: str, values: Mapping[str, object]) -> str:
    """The prompt, the negative prompt if any, and one line of 'Key: value, ...'."""
    pairs = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items())
    return "\n".join([prompt, *([NEGATIVE + negative] if negative else []), pairs])


def parsed(text: str) -> dict[str, str]:
    """The prompt as 'Prompt', 'Negative prompt', and every pair of the last line; unknown text is all prompt."""
    lines = text.strip().split("\n")
    pairs = dict(PAIR.findall(lines[-1]))
    if len(pairs) < LEAST_PAIRS:
        pairs, body = {}, lines
    else:
        body = lines[:-1]
    start = next((i for i, line in enumerate(body) if line.startswith(NEGATIVE.strip())), len(body))
    negative = "\n".join(body[start:]).removeprefix(NEGATIVE.strip()).strip()
    fields = {"Prompt": "\n".join(body[:start]).strip(), "Negative prompt": negative}
    return fields | {key: _plain(value.strip()) for key, value in pairs.items()}


def _quoted(value: str) -> str:
    if not any(mark in value for mark in ',:\n"'):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _plain(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    marks = {"n": "\n"}
    return re.sub(r"\\(.)", lambda escape: marks.get(escape[1], escape[1]), value[1:-1])
