"""Reads what peft and diffusers state beside a LoRA's tensors: alpha per layer, how rotations are made.

Imports no torch. peft writes an adapter_config.json, diffusers the same document into the file's metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hires.checkpoints.adapters.keys import NETWORK, TEXT, TEXT_2
from hires.checkpoints.headers import read_header
from hires.errors import ModelError
from hires.units import Json

PEFT_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
COMPONENTS = {"unet": NETWORK, "transformer": NETWORK, "text_encoder": TEXT, "text_encoder_2": TEXT_2}
LARGEST_ALPHA = 1e6
NEUMANN_TERMS = 5
"""peft's default: rotations are made by a series of so many terms."""
_QUANTIFIERS = re.compile(r"[*+?{]")
_LONGEST, _MOST = 200, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What is stated for one component; the defaults are those of a file that states nothing."""

    alpha: float | None = None
    """For every layer that has none of its own; None for as much as the rank."""
    rank: int | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """alpha by the names of layers, as a whole, as an end, or as a regular expression for one."""
    rslora: bool = False
    """Whether the factor is alpha / sqrt(r) (Kalajdzievski 2023)."""
    peft: bool = False
    """Whether peft wrote the file."""
    neumann_terms: int = NEUMANN_TERMS
    """Terms of the series that peft's OFT makes rotations by; 0 for the exact Cayley transform."""

    def alpha_of(self, name: str) -> float | None:
        """The alpha of a layer; None where none is stated."""
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if _names(pattern, name)), self.alpha)


def stated_beside(path: Path) -> dict[str, Stated]:
    """What is stated beside the tensors of a file, by component. ModelError where it cannot be read or honoured."""
    beside = path.parent / CONFIG_FILE
    try:
        if path.name == PEFT_FILE and beside.is_file():
            document = json.loads(beside.read_text())
        else:
            document = json.loads(read_header(path).metadata.get(METADATA, "{}"))
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
        return {component: _stated(_of_component(document, component)) for component in (NETWORK, TEXT, TEXT_2)}
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"loras {path}: its configuration cannot be used ({error}); save the LoRA again") from None


def _of_component(document: Json, component: str) -> Json:
    """The entries for a component: those under its name, and those under no component's name."""
    found: Json = {}
    for key, value in document.items():
        owner, dot, name = key.partition(".")
        if not dot or owner not in COMPONENTS:
            found.setdefault(key, value)
        elif COMPONENTS[owner] == component:
            found[name] = value
    return found


def _stated(document: Json) -> Stated:
    kind = str(document.get("peft_type") or "LORA").upper()
    alpha = document.get("lora_alpha", document.get("alpha"))
    terms = document.get("num_cayley_neumann_terms", NEUMANN_TERMS)
    if document.get("coft") is True:
        raise ValueError("coft, a rotation held small while it is trained, is not supported")
    if kind not in ("LORA", "LOHA", "LOKR", "OFT", "BOFT"):
        raise ValueError(f"peft_type {kind[:40]} is not supported")
    patterns = document.get("alpha_pattern") or {}
    return Stated(
        alpha=None if alpha is None else _number(alpha, "alpha"),
        rank=_whole(document["r"], "r") if document.get("r") else None,
        alpha_pattern={_checked(pattern): _number(value, "alpha_pattern") for pattern, value in patterns.items()},
        rslora=document.get("use_rslora") is True,
        peft="peft_type" in document or "lora_alpha" in document,
        neumann_terms=_whole(terms, "num_cayley_neumann_terms") if document.get("use_cayley_neumann", True) else 0,
    )


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{name} is {value!r}, no number")
    number = float(value)
    if not (math.isfinite(number) and abs(number) <= LARGEST_ALPHA):
        raise ValueError(f"{name} is {number:g}")
    return number


def _whole(value: object, name: str) -> int:
    if type(value) is not int or not 1 <= value <= 2**20:
        raise ValueError(f"{name} is {value!r}")
    return value


def _checked(pattern: str) -> str:
    """A pattern that takes no time to try: short, with few quantifiers, none behind a bracket."""
    if len(pattern) > _LONGEST or len(_QUANTIFIERS.findall(pattern)) > _MOST or re.search(r"\)[*+?{]|\\[1-9]", pattern):
        raise ValueError(f"alpha_pattern {pattern[:80]!r} is too complicated")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"alpha_pattern {pattern[:80]!r} is no regular expression ({error})") from None
    return pattern


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern of peft names a layer: the whole name, or what follows a dot."""
    starts = [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]
    inner = pattern.removeprefix("^")
    return any(re.fullmatch(inner, name[start:]) for start in (starts if inner == pattern else starts[:1]))
