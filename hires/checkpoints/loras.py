"""Checks LoRAs before any is loaded, and applies the profiles of few-step ones.

Reads headers only; imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hires.checkpoints.detect_file import Finding, identify_lora
from hires.checkpoints.families import UNetShape
from hires.checkpoints.headers import Header, read_header
from hires.checkpoints.profiles import Match, match, names_of
from hires.checkpoints.spec import ModelSpec, as_profile, fits
from hires.errors import ModelError
from hires.options.lora import LoraRef

TOWERS = (("lora_te1_", "lora_te_", "text_encoder."), ("lora_te2_", "text_encoder_2."))
PEFT_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)


def lora_file(ref: LoraRef) -> Path:
    """The file of a LoRA; of a folder the one that diffusers or peft writes. ModelError where there is none."""
    try:
        path = Path(ref.path).expanduser()
        if path.is_file():
            return path
        inside = [path / name for name in FOLDER_FILES if (path / name).is_file()]
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"loras {ref.path[:80]}: cannot be looked at ({error}); give a .safetensors file") from None
    if inside:
        return inside[0]
    raise ModelError(f"loras {ref.path}: no such file; give a .safetensors file, and a scale after a colon if it is not 1")


def tower_loras(loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
    """Those LoRAs that change a text tower."""
    prefixes = tuple(prefix for prefixes in TOWERS for prefix in prefixes)
    return tuple(ref for ref in loras if any(name.startswith(prefixes) for name in read_header(lora_file(ref)).tensors))


def lora_files(ref: LoraRef) -> tuple[Path, ...]:
    """The files that a LoRA is read from: its tensors, and the configuration that peft writes beside them."""
    path = lora_file(ref)
    beside = path.parent / CONFIG_FILE
    return (path, beside) if path.name == PEFT_FILE and beside.is_file() else (path,)


def with_loras(spec: ModelSpec, loras: Sequence[LoraRef], profile: str | None = None) -> ModelSpec:
    """The facts of a model with these LoRAs, of which few-step ones bring their profile unless `few_step` is given.

    ModelError for one of another family.
    """
    for ref in loras:
        path = lora_file(ref)
        header = read_header(path)
        finding = identify_lora(header)
        if finding is None:
            few = ", ".join(sorted(header.tensors)[:3])
            raise ModelError(
                f"loras {path}: holds no LoRA layers (but {few}); give a LoRA of kohya's, diffusers' or peft's keys"
            )
        check_family(finding, spec)
        told = lora_profile(path, header)
        if told is not None and profile is None and ref.scale != 0:
            spec = _profiled(spec, told, path)
        spec = replace(spec, notes=(*spec.notes, f"LoRA {path.name} merged at {ref.scale:g}: {finding.why[0]}"))
    return spec


def check_family(finding: Finding, spec: ModelSpec) -> None:
    """ModelError where a LoRA was made for another family than the model's, both named."""
    made_for = f"is for {finding.family}" if finding.family else "was made for another layout"
    refusal = f"loras {finding.path}: {made_for} ({'; '.join(finding.why)}), the model {spec.name} is {spec.family}"
    unet, pixart = isinstance(spec.network, UNetShape), finding.family == "pixart"
    if unet == pixart:
        raise ModelError(f"{refusal}; leave it out, or give a model of its family")
    if isinstance(spec.network, UNetShape) and finding.context not in (None, spec.network.context_width):
        raise ModelError(
            f"{refusal}, whose text is {spec.network.context_width} wide; leave it out, or give a model of its family"
        )
    assert finding.header is not None
    towers = sum(name.startswith(tower_prefixes(spec)) for name in finding.header.tensors)
    if towers:
        raise ModelError(f"{refusal}: {towers} of its keys are for a text tower that takes none here; leave it out")


def tower_prefixes(spec: ModelSpec) -> tuple[str, ...]:
    """What the keys of text layers start with that this model has no place for: T5 takes none, SD1.5 has one tower."""
    taking = 0 if spec.facts.text == ("t5",) else len(spec.facts.text)
    return tuple(prefix for prefixes in TOWERS[taking:] for prefix in prefixes)


def lora_profile(path: Path, header: Header) -> Match | None:
    """The profile that a LoRA's name, its folder's or repository's in the hub cache, or its title in the metadata tells."""
    return match(names_of(path, header.metadata), "lora")


def _profiled(spec: ModelSpec, told: Match, path: Path) -> ModelSpec:
    """The model run as a few-step LoRA was made for. ModelError for a model that the LoRA was not distilled from."""
    profile = told.profile
    if spec.profile == profile or spec.facts.few_step == profile.few_step == "lcm":
        return spec
    if not fits(spec, profile):
        raise ModelError(
            f"loras {path}: a LoRA of {profile.title} ({told.reason}) runs on {' or '.join(profile.bases)} with epsilon "
            f"prediction, which it distils; {spec.name} is {spec.family} ({spec.parameterisation}): give such a checkpoint "
            f"with `model`, leave the LoRA out, or give `few_step` none to merge it all the same"
        )
    before = "" if spec.profile is None else f", instead of {spec.profile.name}"
    return as_profile(spec, profile, f"of LoRA {path.name} ({told.reason}){before}")
