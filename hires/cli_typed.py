"""What a user types, as values; the messages name what was typed."""

from __future__ import annotations

import typer


def whole(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number") from None


def level(text: str) -> float | str:
    """'auto' or a number."""
    return text if text == "auto" else number(text)
