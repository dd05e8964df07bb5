"""The options of `render` and `edit`, and the request that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from hires.errors import RequestError
from hires.options.declarations import (
    BITS,
    COLOUR_FIXES,
    DTYPES,
    KV_COMPRESSIONS,
    POSITION_MODES,
    PRESETS,
    SAMPLER_NAMES,
    SCHEDULE_NAMES,
    STRATEGIES,
    DrawingOptions,
    EditingOptions,
    JournalOptions,
    MachineOptions,
    ModelOptions,
    NetworkOptions,
    OutputOptions,
    ResumeOptions,
    SamplingOptions,
    SizeOptions,
    StartOptions,
    StrengthOptions,
)
from hires.options.fields import Option, check
from hires.options.lora import LoraRef
from hires.options.stage import NOTHING_SAID, StageSpec, parse_policy
from hires.sampling import registry
from hires.tiling.geometry import Size

__all__ = [
    "BITS",
    "COLOUR_FIXES",
    "DTYPES",
    "KV_COMPRESSIONS",
    "POSITION_MODES",
    "PRESETS",
    "SAMPLER_NAMES",
    "SCHEDULE_NAMES",
    "STRATEGIES",
    "EditOptions",
    "JournalOptions",
    "RenderOptions",
    "RenderRequest",
]


@dataclass(frozen=True, kw_only=True)
class PaintOptions(
    ResumeOptions, OutputOptions, MachineOptions, NetworkOptions, SamplingOptions, ModelOptions, DrawingOptions, SizeOptions
):
    """What `render` and `edit` share."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions(StartOptions, PaintOptions):
    """The options of `hires.render`."""


@dataclass(frozen=True, kw_only=True)
class EditOptions(EditingOptions, PaintOptions):
    """The options of `hires.edit`."""

    model: Annotated[str, Option(help="A model that edits, such as cosxl_edit.safetensors.", group="model", panel="Model")] = (
        field()
    )  # required: the model of the other commands has a default


NOT_APPLICABLE = {
    "edit": {
        "init": "the picture to change is the first argument",
        "strength": "a model that edits draws from noise and sees the picture beside it",
        "mask": "a model that edits changes whole pictures; `hires render --init --mask` draws a part anew",
        "control": "ControlNets exist for PixArt, which does not edit",
    },
    "render": {"image_guidance": "only a model that edits sees a picture beside the noise"},
}
"""Options of one command that another does not take, each with its reason."""


@dataclass(frozen=True, kw_only=True)
class RenderRequest(StrengthOptions, EditingOptions, NetworkOptions, SamplingOptions, ModelOptions, DrawingOptions):
    """What the planner gets: options as values, in pixels; None lets the plan choose. RequestError for invalid values."""

    prompt: str
    size: Size
    parts: str | None = None
    vae: str | None = None
    tiny_vae: str | None = None
    lora_dir: str | None = None
    embeddings: str | None = None
    loras: tuple[LoraRef, ...] = ()
    original_size: Size | None = None
    target_size: Size | None = None
    crop: tuple[int, int] | None = None
    relay: StageSpec = NOTHING_SAID
    stages: tuple[StageSpec, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise RequestError(f"prompt {self.prompt!r}: give valid text")
        check(self)
        parse_policy(self.attention_policy)
        registry.resolve(self.sampler, self.schedule)
