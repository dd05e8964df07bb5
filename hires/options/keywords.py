"""The keywords of the Python functions, for editors and type checkers.

This is the one other spelling of the options; tests/laws/test_option_parity.py holds it equal to the declarations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from hires.events import OnEvent
from hires.options.declarations import JournalOptions
from hires.options.fields import PictureLike
from hires.options.lora import Loras
from hires.options.sizes import SizeLike
from hires.options.stage_text import StageLike


class LoadKeywords(TypedDict, total=False):
    """The options of `hires.load` beside `model`."""

    device: str
    vram: str | int | None
    ram: str | int | None
    family: str | None
    few_step: str | None
    parts: str | Path | None
    lora_dir: str | Path | None
    embeddings: str | Path | None
    vae: str | Path | None
    prediction: str | None
    zero_terminal_snr: bool
    loras: Loras
    dtype: str
    weights: str | None
    attention: str | None
    tiny_vae: str | Path | None
    kv_compression: str
    keep_weights: str


class SharedKeywords(TypedDict, total=False):
    """What `render`, `edit`, `upscale` and `plan` take."""

    output: str | Path | None
    overwrite: bool
    bits: int | None
    on_event: OnEvent | None
    device: str
    vram: str | int | None
    ram: str | int | None
    dtype: str
    size: SizeLike | None
    negative: str
    seed: int
    steps: int | None
    guidance: float | None
    preset: str
    family: str | None
    few_step: str | None
    parts: str | Path | None
    lora_dir: str | Path | None
    embeddings: str | Path | None
    vae: str | Path | None
    prediction: str | None
    zero_terminal_snr: bool
    loras: Loras
    prompt_syntax: str | None
    clip_skip: int | None
    prompt_l: str | None
    negative_l: str | None
    original_size: SizeLike | None
    target_size: SizeLike | None
    crop: str | tuple[int, int] | None
    tile_px: int | None
    colour_fix: str | None


class PaintKeywords(SharedKeywords, total=False):
    """What `render`, `edit` and `plan` take."""

    sampler: str | None
    schedule: str | None
    guidance_rescale: float | None
    strategy: str
    overlap_px: int | None
    sigma_max: float | str | None
    weights: str | None
    attention: str | None
    attention_policy: str | None
    relay: StageLike | None
    stages: Sequence[StageLike]
    allow_approximate: bool
    clean_caption: bool
    tiny_vae: str | Path | None
    position_mode: str
    kv_compression: str
    journal: JournalOptions | None


class RenderKeywords(PaintKeywords, total=False):
    """The options of `hires.render`."""

    model: str
    strength: float | None
    init: PictureLike | None
    mask: PictureLike | None
    control: PictureLike | None


class EditKeywords(PaintKeywords, total=False):
    """The options of `hires.edit` beside `model`, which it requires."""

    image_guidance: float | None


class EnlargingKeywords(TypedDict, total=False):
    """The keywords that only enlargements take."""

    scale: float | None
    upscaler: str | Path | None
    refine: bool


class UpscaleKeywords(SharedKeywords, EnlargingKeywords, total=False):
    """The options of `hires.upscale`."""

    model: str
    strength: float | None
    prompt: str


class PlanKeywords(RenderKeywords, EnlargingKeywords, total=False):
    """The options of `hires.plan`."""

    image_guidance: float | None
    picture: PictureLike | None
