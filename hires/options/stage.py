"""The settings of one stage of a render, parsed and checked without torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from hires.errors import RequestError, unknown
from hires.kernels.attention_policies import MOVING, POLICIES
from hires.refine.renoise import RULES
from hires.sampling import registry
from hires.tiling.geometry import Size

ENLARGERS = ("pixel", "latent", "lanczos", "unsharp", "mix")
GUIDES = ("structure", "pull")
BLENDS = ("hann", "gauss", "box", "linear")


def known(what: str, value: str, names: tuple[str, ...]) -> None:
    """RequestError, with the known names, for another one; `what` is what they name."""
    if value not in names:
        raise RequestError(unknown(what, value, names))


@dataclass(frozen=True, slots=True)
class PolicyName:
    """An attention policy as it was given."""

    name: str = "global"
    """One of `POLICIES`."""
    value: int | None = None
    """Its number; None for the policy's own."""
    shift: bool = False
    """Whether the grid of its blocks moves from step to step."""


def parse_policy(text: str | None) -> PolicyName:
    """'npa', 'npa:1024', 'npa:1024+shift', 'windows:512', 'kvpool:2', 'proportional' or 'global'; None is 'global'.

    RequestError for anything else.
    """
    match = re.fullmatch(r"([a-z]+)(?::([1-9]\d{0,6}))?(\+shift)?", "global" if text is None else text)
    if (
        match is None
        or match[1] not in POLICIES
        or (match[1] == "global" and match[2])
        or (match[1] not in MOVING and match[3])
    ):
        raise RequestError(
            f"attention_policy {text}: give one of {', '.join(POLICIES)}; a window in pixels may follow, such as npa:1024, "
            "or a factor, such as kvpool:2; and +shift where there are windows"
        )
    return PolicyName(match[1], int(match[2]) if match[2] else None, bool(match[3]))


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidePlan:
    """What holds a stage to the picture it starts from; its weight falls with sigma."""

    kind: str = "structure"
    """structure: the part below `cutoff`, by ScaleDiff's ramp; pull: the whole, by the fourth power of sigma over the first
    (SUPIR).
    """
    cutoff: float | None = None
    """In cycles per cell; None, in a `StageSpec`, for all that the base picture can hold, its Nyquist frequency on the
    stage's canvas.
    """

    def __post_init__(self) -> None:
        known("guide", self.kind, GUIDES)
        if self.cutoff is not None and not 0 < self.cutoff <= 0.5:
            raise RequestError(f"guide cutoff {self.cutoff:g}: give cycles per cell, above 0 and up to 0.5")

    def __str__(self) -> str:
        if self.kind == "pull":
            return "pulled"
        return f"held below {self.cutoff:g} cycles per cell" if self.cutoff else "held to all that the base picture holds"


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSpec:
    """The tiles of a stage."""

    tile_px: int | None = None
    """The side in pixels; None for the model's own."""
    overlap_px: int | None = None
    """How far they overlap, in pixels; None for the model's own."""
    blend: str = "hann"
    """Their weights, one of `BLENDS`."""
    shift: bool = False
    """Whether their grid moves at every step (Spot's)."""

    def __post_init__(self) -> None:
        known("blend", self.blend, BLENDS)
        if self.tile_px is not None and self.tile_px < 1:
            raise RequestError(f"stage: tile={self.tile_px}: give a tile side in pixels, such as 1024")
        if self.overlap_px is not None and self.overlap_px < 0:
            raise RequestError(f"stage: overlap={self.overlap_px}: give a number of pixels from 0 up to below the tile")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """One stage of a render; None takes the value of the relay, then of the preset, then of the model."""

    size: Size | None = None
    """The canvas in pixels."""
    sigma_start: float | None = None
    """The noise that the enlarged picture is given; under the rule `renoise` area (FreCaS's) what the rule starts from."""
    sigma_end: float | None = None
    """The last noise level before 0."""
    renoise: str | None = None
    """The rule for the noise, one of `refine.renoise.RULES`."""
    steps: int | None = None
    """Steps of the schedule."""
    sampler: str | None = None
    """A name of `sampling.registry.SAMPLER_FACTS`."""
    schedule: str | None = None
    """A name of `sampling.registry.SCHEDULE_FACTS`."""
    enlarger: str | None = None
    """How the stage before is enlarged, one of `ENLARGERS`."""
    guides: tuple[GuidePlan, ...] | None = None
    """What holds the stage to the picture that it starts from."""
    attention: str | None = None
    """An attention policy over the whole canvas."""
    windows: WindowSpec | None = None
    """Tiles in place of an attention policy."""
    guidance: float | None = None
    """As in `StagePlan`, and so are the next three."""
    guidance_high: float | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.enlarger is not None:
            known("enlarger", self.enlarger, ENLARGERS)
        if self.renoise is not None:
            known("re-noise rule", self.renoise, RULES)
        parse_policy(self.attention)
        if self.windows is not None and self.attention not in (None, "global"):
            raise RequestError(
                f"stage: attention={self.attention} goes over the whole canvas, and tile or overlap cut it: one of the two"
            )
        registry.resolve(self.sampler, self.schedule)
        if self.steps is not None and not (isinstance(self.steps, int) and 1 <= self.steps <= 1000):
            raise RequestError(f"stage: steps={self.steps}: give a number of steps from 1 to 1000")
        for name in ("sigma_start", "guidance", "guidance_high"):
            self._within(name, 0.0, 1e6, open_low=name == "sigma_start")
        self._within("sigma_end", 0.0, 1e6)
        self._within("guidance_rescale", 0.0, 1.0)
        low, high = self.guidance_interval or (0.0, math.inf)
        if not 0 <= low < high:
            raise RequestError(f"stage: interval={low:g}:{high:g}: give a lower and a higher sigma, such as 0.28:inf")

    def _within(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        if value is not None and not (low <= value <= high and not (open_low and value == low)):
            raise RequestError(f"stage: {name}={value:g}: give a number from {low:g} to {high:g}")

    def over(self, *behind: StageSpec) -> StageSpec:
        """Each field from the first of these stages that sets it: this one, then those behind it."""
        order = (self, *behind)

        def first(name: str) -> object:
            return next((value for spec in order if (value := getattr(spec, name)) is not None), None)

        values = {field.name: first(field.name) for field in fields(self)}
        if any(spec.windows for spec in order):  # tiles and whole-canvas attention shut each other out: the first to speak
            speaker = next(spec for spec in order if spec.windows or spec.attention)
            values |= {"windows": speaker.windows, "attention": speaker.attention}
        return StageSpec(**values)  # type: ignore[arg-type]


NOTHING_SAID = StageSpec()
