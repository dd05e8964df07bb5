"""Runs a checkpoint as its few-step profile says."""

from __future__ import annotations

from dataclasses import replace

from hires.checkpoints.detect_file import Finding
from hires.checkpoints.families import FAMILIES, FamilyFacts
from hires.checkpoints.few_step.profiles import NONE, Profile, find_profile, match, names_of
from hires.checkpoints.model import ModelSpec, embeds_guidance, sigma_table
from hires.errors import RequestError

EMBEDDED_GUIDANCE, EMBEDDED_UP_TO = 8.0, 14.0
"""The guidance of an LCM that is told it: its card's, and the highest that it was trained with (Luo et al. 2023: 2 to 14)."""


def profiled(spec: ModelSpec, finding: Finding, family: str | None, profile: str | None) -> ModelSpec:
    """The same model with the profile that is asked for, or that its name tells unless its family or hires.json was given."""
    if profile is not None:
        return spec if profile == NONE else as_profile(spec, find_profile(profile), "as asked for")
    found = match(names_of(finding.path, finding.header.metadata if finding.header else {}), "model")
    if embeds_guidance(spec):
        return as_profile(spec, find_profile("lcm"), "time_embedding.cond_proj: it is told the guidance scale")
    if found is None or (finding.path / "hires.json").is_file() or (family and spec.facts.few_step):
        return spec
    base = base_family(spec)
    if family is not None:
        note = (
            f"{found.reason}: run as plain {base.title}, as `family` says; `few_step` {found.profile.name} runs it in few steps"
        )
        return replace(spec, notes=(*spec.notes, note))
    if not fits(spec, found.profile):
        if base.network != "unet":
            return spec
        made_for = " or ".join(found.profile.bases)
        note = (
            f"{found.reason}: {found.profile.title} exists for {made_for} (eps), this is {spec.family} "
            f"({spec.parameterisation}): run as plain {base.title}"
        )
        return replace(spec, notes=(*spec.notes, note))
    return as_profile(spec, found.profile, found.reason)


def base_family(spec: ModelSpec) -> FamilyFacts:
    """The family of the plain model with the same keys."""
    return FAMILIES[spec.facts.same_keys_as or spec.family]


def fits(spec: ModelSpec, profile: Profile) -> bool:
    """Whether a profile's method was made for a model of this family and prediction."""
    return base_family(spec).name in profile.bases and spec.parameterisation in ("eps", "x0")


def as_profile(spec: ModelSpec, profile: Profile, reason: str) -> ModelSpec:
    """The same model, run as a profile says. RequestError for one that the profile was not made for."""
    if not fits(spec, profile):
        raise RequestError(
            f"few_step {profile.name}: {profile.title} exists for {' or '.join(profile.bases)} with epsilon prediction, "
            f"{spec.name} is {spec.family} ({spec.parameterisation}): leave `few_step` out, or give another `model`"
        )
    base, table = base_family(spec), sigma_table(spec)
    assert table is not None, "a model with epsilon prediction has timesteps"
    side = profile.native_px or (spec.native_px if spec.facts.name == base.name else base.native_px)
    facts = replace(
        base,
        few_step=profile.few_step,
        start_timestep=profile.start_timestep,
        size_conditions=spec.facts.size_conditions,
        native_px=side,
        bins=profile.native_px or base.bins,
    )
    run = profile.run(side)
    if embeds_guidance(spec):
        profile = replace(profile, guidance_up_to=EMBEDDED_UP_TO)
        run = replace(run, guidance=EMBEDDED_GUIDANCE, relay_guidance=EMBEDDED_GUIDANCE)
    note = (
        f"profile {profile.name}, {reason}: {run.steps} step{'s' if run.steps > 1 else ''} of {run.sampler} on {run.schedule}, "
        f"guidance {run.guidance:g}, {side} px; `few_step` none runs it as plain {base.title}"
    )
    return replace(
        spec,
        facts=facts,
        parameterisation=profile.parameterisation or spec.parameterisation,
        sigma_max=table[-1 if profile.start_timestep is None else profile.start_timestep],
        native_px=side,
        defaults=run,
        profile=profile,
        notes=(*spec.notes, note),
    )
