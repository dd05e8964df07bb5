"""The options of `upscale`, and the request that they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hires.errors import RequestError
from hires.options.declarations import (
    COLOUR_FIXES,
    DTYPES,
    DrawingOptions,
    MachineOptions,
    ModelOptions,
    OutputOptions,
    SizeOptions,
    StrengthOptions,
)
from hires.options.fields import Option, check, declared
from hires.options.sizes import SizeLike, as_size
from hires.tiling.geometry import Size

REFINE_STRENGTH = 0.35


@dataclass(frozen=True, kw_only=True)
class EnlargingOptions(SizeOptions):
    """By how much, and how."""

    scale: Annotated[
        float | None,
        Option(
            help="Factor of both sides; default: the network's, or 4.",
            metavar="X",
            gt=0,
            le=1000,
            advice="a factor above 0, such as 4",
        ),
    ] = None
    size: Annotated[SizeLike | None, Option(help="Exact width and height instead of --scale.", metavar="WxH")] = None
    upscaler: Annotated[
        str | Path | None,
        Option(
            help="lanczos, demo (Lanczos refined by the shipped model), or a file of a network that spandrel knows.",
            metavar="NAME|FILE",
            group="model",
            panel="Model",
        ),
    ] = "lanczos"
    refine: Annotated[bool, Option(help="Draw over it with the diffusion --model.", panel="Quality")] = False

    def __post_init__(self) -> None:
        check(self)
        check_scale(self)


def check_scale(options: EnlargingOptions) -> None:
    """RequestError where a factor and a size are given."""
    if options.scale is not None and options.size is not None:
        size = as_size(options.size)
        raise RequestError(f"scale {options.scale:g} and `size` {size}: give one of the two")


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions(EnlargingOptions, OutputOptions, MachineOptions, ModelOptions, DrawingOptions, StrengthOptions):
    """The options of `hires.upscale`; those of the diffusion model apply with `refine`."""

    strength: Annotated[
        float | None,
        Option(help="How much is drawn anew; default 0.35.", metavar="X", gt=0, le=1, panel="Quality"),
    ] = None
    prompt: Annotated[str, Option(help="What it shows, for --refine.")] = ""
    bits: Annotated[
        int | None,
        Option(help="8 or 16; default: the picture's.", metavar="N", choices=(8, 16), group="run", panel="Output"),
    ] = None
    tile_px: Annotated[
        int | None,
        Option(
            help="Side of a network's tiles; default: what fits.",
            flag="--tile",
            metavar="PX",
            ge=1,
            panel="Memory",
            advice="a tile side in pixels of the input, such as 256",
        ),
    ] = None
    dtype: Annotated[
        str,
        Option(help="Of the network: auto, fp32, fp16, bf16.", choices=DTYPES, group="machine", panel="Memory"),
    ] = "auto"
    colour_fix: Annotated[
        str | None,
        Option(
            help="For --refine: wavelet, adain or none.",
            metavar="NAME",
            choices=(*COLOUR_FIXES, "none"),
            panel="Quality",
            advice="wavelet, adain or none",
        ),
    ] = "wavelet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength is not None and not self.refined:
            raise RequestError(f"strength {self.strength:g}: is of a refinement; add `refine`")

    @property
    def refined(self) -> bool:
        """Whether a diffusion model draws over the enlarged picture."""
        return self.refine or self.upscaler == "demo"


REFINEMENT = ("strength", "prompt", "colour_fix", *declared(DrawingOptions), *declared(ModelOptions))
"""The options of `upscale` that apply to the diffusion model alone."""


@dataclass(frozen=True, kw_only=True)
class Refinement(ModelOptions, DrawingOptions):
    """How an enlarged picture is drawn over by a diffusion model; fields as in `hires.render`."""

    strength: float = REFINE_STRENGTH
    prompt: str = ""
    tile_px: int | None = None
    structure: bool = True
    colour_fix: str | None = "wavelet"


@dataclass(frozen=True, kw_only=True)
class UpscaleRequest(EnlargingOptions, MachineOptions):
    """What applies to every picture of a batch."""

    size: Size | None = None
    upscaler: str = "lanczos"
    refinement: Refinement | None = None
    bits: int | None = None
    tile_px: int | None = None
    dtype: str = "auto"
