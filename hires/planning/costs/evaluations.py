"""How often a stage evaluates the network: sampler, guidance and interval."""

from __future__ import annotations

import math

from hires.checkpoints.model import ModelSpec, embeds_guidance, schedule_table
from hires.planning.plan import StagePlan
from hires.sampling import registry
from hires.sampling.schedules import make_levels


def stage_levels(spec: ModelSpec, stage: StagePlan) -> list[float]:
    """The noise levels that a stage goes down, ending with 0."""
    levels = make_levels(
        stage.schedule,
        stage.steps,
        sigma_min=max(spec.sigma_min, stage.sigma_end),
        sigma_max=spec.sigma_max,
        table=schedule_table(spec, stage.schedule),
        start=stage.sigma_start,
        discard_penultimate=registry.SAMPLER_FACTS[stage.sampler].discard_penultimate,
    )
    return levels[stage.steps - stage.taken_steps :]


def estimates_per_step(stage: StagePlan, spec: ModelSpec) -> int:
    """How many conditions are evaluated at once at most: of an edit three, with guidance two, else one."""
    if spec.facts.image_channels:
        return 3
    plain = embeds_guidance(spec) or (stage.guidance == 1.0 and stage.guidance_high in (None, 1.0))
    return 1 if plain and spec.prompt_parts == 1 else 2


def estimates(stage: StagePlan, spec: ModelSpec) -> list[int]:
    """How many conditions every evaluation of a stage is of, in turn; evaluations within a step count as at its level."""
    levels = stage_levels(spec, stage)[:-1]
    count, most = registry.evaluations(stage.sampler, stage.taken_steps), estimates_per_step(stage, spec)
    low, high = stage.guidance_interval or (0.0, math.inf)
    if spec.prompt_parts > 1:  # all of them and the negative prompt at every step
        return [spec.prompt_parts + 1] * count
    at = [most if low < level <= high or spec.facts.image_channels else 1 for level in levels]
    return [at[i * len(at) // count] for i in range(count)]
