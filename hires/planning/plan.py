"""The values that flow from a request to a result. Frozen, no torch: `hires plan` needs nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hires.kernels.attention_policies import EVERYWHERE, Policy
from hires.options.stage import GuidePlan
from hires.tiling.geometry import Size, TileGrid
from hires.units import Json, gib, pflop


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
        """The steps that run: all, or the share that a strength leaves."""
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
        """The predicted peak over all stages."""
        return max(cost.peak_bytes for cost in self.costs)

    @property
    def seconds(self) -> float:
        """The predicted seconds of all stages."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def flops(self) -> float:
        """The FLOPs of all stages."""
        return sum(cost.flops for cost in self.costs)

    def to_json(self) -> Json:
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
