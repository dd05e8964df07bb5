"""What a render draws, decided before how it runs; choices with reasons.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from hires.checkpoints.model import ModelSpec
from hires.devices.spec import DeviceSpec
from hires.options.render import RenderRequest
from hires.options.stage import StageSpec
from hires.planning.plan import StagePlan
from hires.tiling.geometry import Size

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value and why it was chosen; the reason is empty where nothing needs to be said."""

    value: T
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """What is set for one stage."""

    index: int
    """Its place in the plan, from 0."""
    user: StageSpec
    """By the user."""
    preset: StageSpec
    """By the preset, for everything that the user left open."""

    @property
    def merged(self) -> StageSpec:
        """The user's settings with the preset's for those left open."""
        return self.user.over(self.preset)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDraft:
    """One stage before its batch is known."""

    stage: StagePlan
    tiled: StagePlan | None
    """The stage in tiles, for a budget that has no room for it in one piece. None where the stage is tiled anyway, or the
    user chose its attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Every decision about a render that changes pixels."""

    request: RenderRequest
    spec: ModelSpec
    device: DeviceSpec
    canvas: Choice[Size]
    """What is rendered: the size asked for, rounded up to what the model needs."""
    strategy: Choice[str]
    dtype: Choice[str]
    sampler: Choice[str]
    schedule: Choice[str]
    guidance: Choice[float]
    tile_cells: tuple[int, int]
    """Side and overlap of tiles in latent cells, where a stage sets no others."""
    bins: tuple[Size, ...]
    """The sizes that the model's base pictures are rendered at."""
    stages: tuple[StageDraft, ...]
