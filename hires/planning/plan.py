"""The values of a plan.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from hires.kernels.attention_policies import EVERYWHERE, Policy
from hires.options.stage import GuidePlan
from hires.planning import page as pages
from hires.tiling.geometry import Size, TileGrid
from hires.units import Json, gib, pflop

WHERE = {
    "none": "stay on the device",
    "components": "of one part at a time on the device",
    "layers": "in host memory, fetched layer by layer",
}
"""The places for the weights, the fastest first, each in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What one stage is predicted to take."""

    stage: str
    """The stage's name."""
    peak_bytes: int
    """Bytes on the device at its peak, weights included."""
    flops: float
    """FLOPs of all its evaluations."""
    seconds: float
    """By what the machine sustains."""
    enlarge_seconds: float = 0.0
    """Those of them that it takes to decode the stage before, enlarge it and encode it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One denoising stage."""

    name: str
    """base, or refine and a number."""
    canvas: Size
    """In pixels."""
    grid: TileGrid
    """Its tiles, in latent cells."""
    sigma_start: float
    """Where on the noise scale it starts."""
    steps: int
    """How many steps the schedule is divided into from `sigma_start` down."""
    sampler: str
    schedule: str
    guidance: float
    """The CFG scale; that of the low band only where there is a `guidance_high`."""
    image_guidance: float = 1.0
    """How closely an edit keeps to the picture."""
    strength: float | None = None
    """The share of the steps, the last ones, that is taken from a given picture; None from noise."""
    enlarger: str | None = None
    """How the stage before is enlarged; None for the first stage."""
    shift_cells: int = 0
    """By how much at most the grid of the tiles, or of the attention policy, moves from step to step."""
    attention: Policy = EVERYWHERE
    """Which latent cells self-attention attends to."""
    batch: int = 1
    """How many pictures are evaluated at once, a picture being one tile for one estimate."""
    guides: tuple[GuidePlan, ...] = ()
    """What holds the stage to the picture that it starts from."""
    guidance_high: float | None = None
    """The CFG scale of the high band."""
    guidance_rescale: float = 0.0
    """How far the guided estimate's standard deviation is brought back to the conditional one's, 0 to 1."""
    guidance_interval: tuple[float, float] | None = None
    """(low, high] in sigma; outside it the prompt stands alone, at half the cost."""
    sigma_end: float = 0.0
    """The last noise level before 0; 0 for the model's least."""
    blend: str = "hann"
    """The tiles' weights, one of `BLENDS`."""

    @property
    def taken_steps(self) -> int:
        """The steps that run: all, or the share that a strength leaves."""
        return self.steps if self.strength is None else int(self.steps * self.strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """How latents become pixels, and back; the pixels are the same in every way."""

    policy: str
    """One of `VAE_POLICIES`; whole is the autoencoder itself."""
    band_rows: int
    """Rows of a map that are computed at once."""
    dtype: str
    """The type that the autoencoder runs in."""

    def __str__(self) -> str:
        if self.policy in ("whole", "tiny"):
            return "whole" if self.policy == "whole" else "with the tiny autoencoder, an approximation"
        return f"in bands of {self.band_rows} rows ({self.policy})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A cheaper way to run one stage after an out-of-memory."""

    stage: str
    """denoise or decode."""
    batch: int
    """Pictures evaluated at once."""
    decode: DecodePlan
    """The way to decode, for the stage decode."""
    exact: bool
    """Whether the picture stays the same."""
    peak_bytes: int | None
    """Predicted; None where it is not known."""
    reason: str
    """What changes."""
    offload: str = "none"
    """Where weights are kept, one of `WHERE`."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MemoryPlan:
    """Everything that is decided before the first kernel runs; printable, hashable, saved with the picture.

    A notebook shows it as the drawing of `svg`.
    """

    model: str
    """The model's name."""
    output: Size
    """The size that is delivered."""
    canvas: Size
    """The size that is rendered, a multiple of what the model needs."""
    strategy: str
    stages: tuple[StagePlan, ...]
    decode: DecodePlan
    """The chosen way to decode."""
    batch: int
    """Pictures evaluated at once by the stage that evaluates most."""
    dtype: str
    device: str
    """The device in words."""
    budget_bytes: int
    """What the process may hold on it."""
    offload: str
    """Where weights are kept, one of `WHERE`."""
    backends: tuple[tuple[str, str], ...]
    """(operator, backend) of what runs through a dispatch."""
    costs: tuple[StageCost, ...]
    """Each stage's, decoding included."""
    ladder: tuple[Rung, ...]
    """What follows after an out-of-memory, in order."""
    notes: tuple[str, ...]
    """A reason for each choice."""
    alternatives: tuple[str, ...] = ()
    """Other places for the weights, with their seconds or why they do not fit."""
    text_on_host: bool = False
    """Whether the text encoders run on the CPU."""
    text_dtype: str = "fp32"
    """The type that the text encoders run in."""
    weights: str | None = None
    """How the network's weights are packed; None for `dtype` itself."""
    weight_bytes: int = 0
    """Bytes of all weights of network and VAE as they are kept, scales included."""
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

    def with_peak(self, stage: str, peak_bytes: int) -> MemoryPlan:
        """The plan where one stage has at least this peak."""
        costs = [replace(c, peak_bytes=max(c.peak_bytes, peak_bytes)) if c.stage == stage else c for c in self.costs]
        return replace(self, costs=tuple(costs))

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

    def page(self) -> pages.Page:
        """What a drawing of the plan shows."""
        last, grid = self.stages[-1], self.latent_grid
        count = f"{grid.count} tile{'s' if grid.count > 1 else ''} of {grid.tile} cells on {grid.canvas}"
        return pages.Page(
            title=f"{self.output} with {self.model}, {self.strategy}, {self.dtype} on {self.device}",
            bars=tuple(pages.Bar(stage=cost.stage, peak_bytes=cost.peak_bytes, seconds=cost.seconds) for cost in self.costs),
            budget_bytes=self.budget_bytes,
            facts=f"budget {gib(self.budget_bytes)}, weights {WHERE[self.offload]}, decode {self.decode}",
            caption=f"{last.name}: {count}, attention {last.attention}",
            grid=grid,
        )

    def svg(self) -> str:
        """Its stages' peaks against the budget, and the last stage's tiles, as an SVG document."""
        return pages.svg(self.page())

    def __repr__(self) -> str:
        stages = f"{len(self.stages)} stage{'s' if len(self.stages) > 1 else ''}"
        peak = f"peak {gib(self.peak_bytes)} of {gib(self.budget_bytes)}"
        return (
            f"<hires.MemoryPlan {self.output} with {self.model}, {self.strategy}, {stages}, {peak}, about {self.seconds:.0f} s>"
        )

    def _repr_svg_(self) -> str:
        """What notebooks show."""
        return self.svg()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """The drawing, and the plan in words where no picture can be shown."""
        return {"image/svg+xml": self.svg(), "text/plain": self.explain()}
