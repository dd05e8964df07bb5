"""Options of a render, each declared once, and the request that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hires.errors import RequestError
from hires.options.lora import LoraRef
from hires.options.stage import NOTHING_SAID, StageSpec, known, parse_policy
from hires.sampling import registry
from hires.tiling.geometry import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalOptions:
    """resume: fail where nothing unfinished is there. restart: throw an unfinished render away. seconds: between writes."""

    resume: bool = False
    restart: bool = False
    seconds: float = 20.0

    def __post_init__(self) -> None:
        if self.resume and self.restart:
            raise RequestError("--resume and --restart: going on and beginning again; give one of the two")
        if not 0 <= self.seconds <= 86400:
            raise RequestError(f"--journal-seconds {self.seconds:g}: give seconds from 0 to 86400")


STRATEGIES = ("auto", "direct", "tiled", "progressive")
PRESETS = ("fast", "balanced", "best")
COLOUR_FIXES = ("wavelet", "adain")
DTYPES = ("auto", "fp32", "bf16", "fp16")
SCHEDULES = tuple(registry.SCHEDULES)
POSITION_MODES = ("global", "local", "blend")
KV_COMPRESSIONS = ("checkpoint", "average")
SAMPLERS = tuple(registry.SAMPLERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """What the user asked for. Pixel sizes; None means: the plan chooses. RequestError for values out of range.

    sigma_max: the noise level an EDM model starts from, 'auto' for one that goes with the size, None for its own.
    family: what the user says the model is. parts: a folder in which parts that it lacks are looked for. clean_caption:
    prompts go through `captions.clean`. strength: how much of the schedule a given picture goes through, None where the
    render starts from noise; image_guidance: how closely an edit keeps to its picture. position_mode, kv_compression:
    of PixArt, see `pixart.POSITION_MODES` and `asked.pooled_keys`. tiny_vae: the folder of a small autoencoder (TAESD,
    TAESDXL) that draws previews and decodes where every exact way ran out of memory. attention: the one backend
    that the network's attention is to run on. attention_policy: whom self-attention attends to beyond the trained size, such
    as 'npa' or 'npa:1024' (a window in pixels); None for all tokens of a tile. allow_approximate: where nothing exact has
    room, smaller windows may draw another picture. preset: how much work is done, one of `PRESETS`. relay: what every stage
    after the first takes instead of the preset's; stages: all of them, each with its size, the base picture first.
    colour_fix: draws the colours of the picture that a render starts from, or of its base picture, back into the finished one.
    """

    prompt: str
    size: Size
    negative: str = ""
    model: str = "demo"
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    schedule: str | None = None
    strategy: str = "auto"
    dtype: str = "auto"
    tile_px: int | None = None
    overlap_px: int | None = None
    sigma_max: float | str | None = None
    family: str | None = None
    parts: str | None = None
    loras: tuple[LoraRef, ...] = ()
    clean_caption: bool = False
    strength: float | None = None
    image_guidance: float | None = None
    position_mode: str = "global"
    kv_compression: str = "checkpoint"
    tiny_vae: str | None = None
    attention: str | None = None
    attention_policy: str | None = None
    allow_approximate: bool = False
    preset: str = "balanced"
    relay: StageSpec = NOTHING_SAID
    stages: tuple[StageSpec, ...] = ()
    colour_fix: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "seed", "tile_px", "overlap_px"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise RequestError(f"{name}={value!r}: give a whole number")
        if self.guidance is not None and not isinstance(self.guidance, int | float):
            raise RequestError(f"guidance={self.guidance!r}: give a number")
        for text in (self.prompt, self.negative):
            if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
                raise RequestError(f"prompt {text!r}: give valid text")
        parse_policy(self.attention_policy)
        known("strategy", self.strategy, STRATEGIES)
        known("dtype", self.dtype, DTYPES)
        known("preset", self.preset, PRESETS)
        if self.colour_fix is not None:
            known("colour fix", self.colour_fix, COLOUR_FIXES)
        known("position mode", self.position_mode, POSITION_MODES)
        known("key-value compression", self.kv_compression, KV_COMPRESSIONS)
        for name in ("sampler", "schedule"):
            if not isinstance(getattr(self, name), str | None):
                raise RequestError(f"{name}={getattr(self, name)!r}: give a name, such as euler or karras")
        registry.resolve(self.sampler, self.schedule)
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise RequestError(f"--steps {self.steps}: give a number of steps from 1 to 1000")
        if self.guidance is not None and not (math.isfinite(self.guidance) and 0 <= self.guidance <= 100):
            raise RequestError(f"--guidance {self.guidance}: give a number from 0 to 100 (1 turns guidance off)")
        self._check_picture()
        if self.sigma_max is not None and self.sigma_max != "auto":
            self._check_sigma_max(self.sigma_max)
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"--seed {self.seed}: give a whole number from 0 to {2**63 - 1}")
        if self.tile_px is not None and self.tile_px < 1:
            raise RequestError(f"--tile {self.tile_px}: give a tile side in pixels, such as 256 or 1024")
        if self.overlap_px is not None and self.overlap_px < 0:
            raise RequestError(f"--overlap {self.overlap_px}: give a number of pixels from 0 up to below the tile")

    def _check_picture(self) -> None:
        for name, value, most in (("strength", self.strength, 1.0), ("image-guidance", self.image_guidance, 100.0)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise RequestError(f"--{name} {value!r}: give a number above 0 and up to {most:g}")

    @staticmethod
    def _check_sigma_max(value: float | str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not (math.isfinite(float(value)) and 0 < float(value) <= 1e6):
            raise RequestError(f"--sigma-max {value!r}: give 'auto' or a noise level above 0, such as 60")
