"""Presets: how much work a render is, as stages.

The numbers are those of the methods' reference: a base picture at the trained size, then each stage enlarged, re-noised to
about sigma 1 and refined in few steps whose self-attention stays at the trained length. Guidance below sigma 0.28 changes
little and costs half of a step (Kynkäänniemi et al. 2024, 2404.07724), so only `best` pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hires.checkpoints.model import ModelSpec, embeds_guidance
from hires.options.stage import GuidePlan, StageSpec
from hires.sampling import registry

T = TypeVar("T")
LEAST_GUIDED = 0.28
WIDEST_WINDOW_PX = 1024  # of attention outside `best`: wider ones cost more than convolutions and the rest together


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Stages by their place."""

    stages: tuple[StageSpec, ...]
    """The base picture's first; the last one applies to all further stages."""
    growth: float = 2.0
    """By how much a side grows at most from one stage to the next."""

    def stage(self, index: int) -> StageSpec:
        """The preset's stage at a place, from 0; the last one applies to all later places."""
        return self.stages[min(index, len(self.stages) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How a preset changes a model's own numbers."""

    base: float
    """The share of the model's steps that the base picture takes."""
    relay: float
    """The share of the model's steps that later stages take."""
    guided: bool
    """Whether later stages have guidance."""
    interval: tuple[float, float] | None
    """The sigmas within which guidance is on; None for all."""
    widest: bool
    """Whether neighbourhoods are as wide as the pictures that the model was trained on."""
    shift: bool
    """Whether the blocks of neighbourhoods move from step to step."""
    growth: float
    """By how much a side grows at most from one stage to the next."""


EFFORTS = {
    "fast": Effort(base=1.0, relay=0.45, guided=False, interval=None, widest=False, shift=False, growth=4.0),
    "balanced": Effort(
        base=1.0, relay=1.0, guided=True, interval=(LEAST_GUIDED, math.inf), widest=False, shift=False, growth=2.0
    ),
    "best": Effort(base=5 / 3, relay=2.0, guided=True, interval=None, widest=True, shift=True, growth=2.0),
}


def preset(name: str, spec: ModelSpec) -> Preset:
    """A model's stages at an effort. A few-step model takes the steps it was distilled for at any; so do its relay's levels."""
    effort, own = EFFORTS[name], spec.defaults
    few = spec.facts.few_step is not None
    base = StageSpec(steps=own.steps if few else round(own.steps * effort.base), guidance=own.guidance)
    steps = tuple(count if few else max(1, round(count * effort.relay)) for count in own.relay_steps)
    count = max(len(own.relay_steps), len(own.relay_sampler), len(own.enlarger))
    relay = tuple(
        StageSpec(
            sampler=at(own.relay_sampler, index),
            sigma_start=min(own.relay_sigma, spec.sigma_max),
            sigma_end=own.relay_sigma_end,
            renoise="fixed",
            steps=at(steps, index),
            enlarger=at(own.enlarger, index),
            guides=tuple(GuidePlan(kind=kind) for kind in own.guides),
            attention=attention(spec, effort),
            guidance=min(own.guidance, own.relay_guidance) if effort.guided or embeds_guidance(spec) else 1.0,
            guidance_interval=None if few or spec.facts.image_channels else effort.interval,
        )
        for index in range(count)
    )
    return Preset(stages=(base, *relay), growth=effort.growth)


def at(values: Sequence[T], index: int) -> T | None:
    """The value of a stage, the last for all after it; None where there are none."""
    return values[min(index, len(values) - 1)] if values else None


def attention(spec: ModelSpec, effort: Effort) -> str | None:
    """Whom the relay's stages attend to: neighbourhoods over the whole canvas, or None, tiles."""
    if spec.defaults.refine == "tiles":
        return None
    side = spec.native_px if effort.widest else min(spec.native_px, WIDEST_WINDOW_PX)
    return f"npa:{side}{'+shift' if effort.shift and not few_steps(spec) else ''}"


def few_steps(spec: ModelSpec) -> bool:
    """Whether blocks that move every step would upset the sampler: those that reuse estimates, and the fewest steps."""
    return spec.facts.few_step is not None or registry.SAMPLER_FACTS[spec.defaults.sampler].multistep
