"""LoRAs of a request: files and scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hires.errors import RequestError


def loras_of(loras: Loras) -> tuple[LoraRef, ...]:
    """LoRAs given as 'PATH[:SCALE]' or as references. RequestError for an invalid scale."""
    return tuple(parse_lora(lora) if isinstance(lora, str) else lora for lora in loras)


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA to merge: its file, or a folder that holds one, and how strongly."""

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise RequestError(f"LoRA {self.path!r} at {self.scale!r}: give a path and a number")
        if not (math.isfinite(self.scale) and abs(self.scale) <= 100):
            raise RequestError(f"loras {self.path}:{self.scale}: give a scale from -100 to 100")

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


Loras = Sequence[str | LoraRef]


def parse_lora(text: str) -> LoraRef:
    """'style.safetensors:0.8', or a path alone for a scale of 1. A colon that no number follows belongs to the path."""
    path, colon, scale = text.rpartition(":")
    try:
        return LoraRef(path, float(scale)) if colon and path else LoraRef(text)
    except ValueError:
        return LoraRef(text)
