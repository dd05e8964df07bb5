"""The values that flow from a request to a result. Frozen, no torch: `hires plan` needs nothing else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hires.errors import RequestError
from hires.events import StageStats
from hires.kernels.attention_policies import EVERYWHERE, Policy
from hires.sampling import registry
from hires.stage_spec import NOTHING_SAID, GuidePlan, StageSpec, known, parse_policy
from hires.tiling.geometry import Size, TileGrid
from hires.units import gib, pflop

STRATEGIES = ("auto", "direct", "tiled", "progressive")
PRESETS = ("fast", "balanced", "best")
COLOUR_FIXES = ("wavelet", "adain")
DTYPES = ("auto", "fp32", "bf16", "fp16")
SCHEDULES = tuple(registry.SCHEDULES)
POSITION_MODES = ("global", "local", "blend")
KV_COMPRESSIONS = ("checkpoint", "average")
PREVIEW_CELLS = 64  # the longest side of a preview's latents
SAMPLERS = tuple(registry.SAMPLERS)


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA to merge: its file, or a folder that holds one, and how strongly."""

    path: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
            raise RequestError(f"LoRA {self.path!r} at {self.scale!r}: give a path and a number")
        if not (math.isfinite(self.scale) and abs(self.scale) <= 100):
            raise RequestError(f"--lora {self.path}:{self.scale}: give a scale from -100 to 100")

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def parse_lora(text: str) -> LoraRef:
    """'style.safetensors:0.8', or a path alone for a scale of 1. A colon that no number follows belongs to the path."""
    path, colon, scale = text.rpartition(":")
    try:
        return LoraRef(path, float(scale)) if colon and path else LoraRef(text)
    except ValueError:
        return LoraRef(text)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What one stage is predicted to take: device bytes at its peak (weights included), FLOPs, seconds."""

    stage: str
    peak_bytes: int
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One denoising stage: the canvas in pixels, where on the noise scale it starts, and its tiles in cells.

    `steps` divide the schedule from `sigma_start` down; with a `strength` the stage starts from a given picture and takes
    the last `taken_steps` of them. `attention`: whom self-attention attends to, counted in latent cells. `shift_cells`: by
    how much at most the tiles' grid, or the policy's, moves from step to step. `batch`: pictures evaluated at once, a picture
    being one tile for one estimate. `guides` hold the stage to the picture it starts from. `guidance` is the weight of what
    the prompt changes, of its low band only where there is a `guidance_high` for the rest; outside `guidance_interval`,
    (low, high] in sigma, the prompt stands alone and costs half. `sigma_end`: the last level before 0, where it is above the
    model's least. `blend`: the tiles' weights, one of `BLENDS`.
    """

    name: str
    canvas: Size
    grid: TileGrid
    sigma_start: float
    steps: int
    sampler: str
    schedule: str
    guidance: float
    image_guidance: float = 1.0
    strength: float | None = None
    enlarger: str | None = None
    shift_cells: int = 0
    attention: Policy = EVERYWHERE
    batch: int = 1
    guides: tuple[GuidePlan, ...] = ()
    guidance_high: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    sigma_end: float = 0.0
    blend: str = "hann"

    @property
    def taken_steps(self) -> int:
        return self.steps if self.strength is None else int(self.steps * self.strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """How latents become pixels (and back): one of `VAE_POLICIES`, the rows of a map computed at once, and the dtype.

    The pixels are the same for all of them; `whole` is the autoencoder itself.
    """

    policy: str
    band_rows: int
    dtype: str

    def __str__(self) -> str:
        if self.policy in ("whole", "tiny"):
            return "whole" if self.policy == "whole" else "with the tiny autoencoder, an approximation"
        return f"in bands of {self.band_rows} rows ({self.policy})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A cheaper way to run one stage after an out-of-memory: what changes, and whether the picture stays the same."""

    stage: str
    batch: int
    decode: DecodePlan
    exact: bool
    peak_bytes: int | None
    reason: str
    offload: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Everything that is decided before the first kernel runs; printable, hashable, saved with the picture.

    `canvas` is what is rendered, a multiple of what the model needs; `output` is what was asked for and is delivered. `batch`:
    of the stage that evaluates most pictures at once. `offload`: where weights are, one of `search.OFFLOADS`; `alternatives`:
    the other places, with their seconds or why they do not fit.
    """

    model: str
    output: Size
    canvas: Size
    strategy: str
    stages: tuple[StagePlan, ...]
    decode: DecodePlan
    batch: int
    dtype: str
    device: str
    budget_bytes: int
    offload: str
    backends: tuple[tuple[str, str], ...]
    costs: tuple[StageCost, ...]
    ladder: tuple[Rung, ...]
    notes: tuple[str, ...]
    alternatives: tuple[str, ...] = ()
    text_on_host: bool = False
    text_dtype: str = "fp32"
    preset: str = "balanced"
    colour_fix: str | None = None

    @property
    def latent_grid(self) -> TileGrid:
        """The tiles of the last stage, in latent cells."""
        return self.stages[-1].grid

    @property
    def peak_bytes(self) -> int:
        return max(cost.peak_bytes for cost in self.costs)

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.costs)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        document = dataclasses.asdict(self)
        document["latent_grid"] = dataclasses.asdict(self.latent_grid)
        for stage, written in zip(self.stages, document["stages"], strict=True):
            written["attention"] = str(stage.attention)
        document["predicted_peak_bytes"] = self.peak_bytes
        document["predicted_flops"] = self.flops
        document["predicted_seconds"] = round(self.seconds, 2)
        return document

    def explain(self) -> str:
        """The plan as a few lines for people: what runs, and why."""
        lines = [f"{self.output} on {self.device}, strategy {self.strategy}, {self.dtype}, budget {gib(self.budget_bytes)}"]
        for stage, cost in zip(self.stages, self.costs, strict=False):
            tiles = stage.grid.count
            lines.append(
                f"  {stage.name:<10} {stage.canvas!s:>11}  {tiles:>4} tile{'s' if tiles > 1 else ' '} of {stage.grid.tile}"
                f" cells, {stage.taken_steps} steps of {stage.sampler} on {stage.schedule} from sigma {stage.sigma_start:g}"
                f"{f' at strength {stage.strength:g}' if stage.strength is not None else ''}"
                f"{''.join(f', {guide}' for guide in stage.guides)}"
                f"  | peak {gib(cost.peak_bytes)}, {pflop(cost.flops)}, about {cost.seconds:.0f} s"
            )
        for cost in self.costs[len(self.stages) :]:
            lines.append(f"  {cost.stage:<10} peak {gib(cost.peak_bytes)}, {pflop(cost.flops)}, about {cost.seconds:.0f} s")
        lines.append(f"  preset {self.preset}: {pflop(self.flops)} in all, about {self.seconds:.0f} s")
        return "\n".join([*lines, *(f"  - {note}" for note in self.notes)])


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderResult:
    """A finished render: where the file is, what was planned and what it took. drawn: its pixels, or what reads them."""

    path: Path | None
    size: Size
    seed: int
    plan: MemoryPlan
    stats: tuple[StageStats, ...]
    seconds: float
    peak_rss_bytes: int
    drawn: Any = field(default=None, repr=False)

    @property
    def pixels(self) -> Any:
        """(height, width, 3), in memory or, where there is a file, read from it each time."""
        return self.drawn() if callable(self.drawn) else self.drawn

    def predictions(self) -> list[dict[str, Any]]:
        """Per stage that ran: predicted and measured peak bytes and seconds. On a CPU the measured bytes are the process's."""
        planned = {cost.stage: cost for cost in self.plan.costs}
        found = []
        for stage in self.stats:
            cost = planned.get(stage.stage.removesuffix(" (tiny)"))
            if cost is not None:
                found.append(
                    {
                        "stage": stage.stage,
                        "predicted_peak_bytes": cost.peak_bytes,
                        "measured_peak_bytes": stage.peak_bytes,
                        "predicted_seconds": round(cost.seconds, 3),
                        "measured_seconds": stage.seconds,
                    }
                )
        return found

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values: path, size, seed, plan, predictions beside what was measured, stats."""
        return {
            "path": None if self.path is None else str(self.path),
            "size": str(self.size),
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "plan": self.plan.to_json(),
            "predictions": self.predictions(),
            "stats": [dataclasses.asdict(stage) for stage in self.stats],
        }
