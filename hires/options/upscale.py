"""What a run of `hires upscale` is asked for, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hires.errors import RequestError
from hires.options.lora import Loras
from hires.options.stage import known
from hires.tiling.geometry import Size

REFINE_STRENGTH = 0.35
BITS = (8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refinement:
    """How an enlarged picture is drawn over by a diffusion model; fields as of `hires.render`."""

    strength: float = REFINE_STRENGTH
    prompt: str = ""
    negative: str = ""
    model: str = "demo"
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    preset: str = "balanced"
    tile_px: int | None = None
    family: str | None = None
    parts: str | Path | None = None
    loras: Loras = ()
    structure: bool = True
    colour_fix: str | None = "wavelet"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscaleOptions:
    """What holds for every picture of a batch; see `upscale`."""

    scale: float | None = None
    size: Size | None = None
    upscaler: str = "lanczos"
    refinement: Refinement | None = None
    bits: int | None = None
    tile_px: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    vram: str | int | None = None
    ram: str | int | None = None

    def __post_init__(self) -> None:
        known("dtype", self.dtype, ("auto", "fp32", "fp16", "bf16"))
        if self.scale is not None and self.size is not None:
            raise RequestError(f"--scale {self.scale:g} and --size {self.size}: give one of the two")
        if self.scale is not None and not 0 < self.scale <= 1000:
            raise RequestError(f"--scale {self.scale:g}: give a factor above 0, such as 4")
        if self.bits is not None and self.bits not in BITS:
            raise RequestError(f"--bits {self.bits}: give 8 or 16")
        if self.tile_px is not None and self.tile_px < 1:
            raise RequestError(f"--tile {self.tile_px}: give a tile side in pixels of the input, such as 256")
