"""Checks LoRAs before any is loaded, and applies the profiles of few-step ones.

Reads headers only; imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hires.checkpoints.adapters.detect import FOREIGN, bundled_embeddings, other_kind
from hires.checkpoints.adapters.keys import IDLE, TEXT, TEXT_2, component_of, read_layers, split_keys
from hires.checkpoints.adapters.stated import CONFIG_FILE, PEFT_FILE
from hires.checkpoints.detect_file import Finding, identify_lora
from hires.checkpoints.families import UNetShape
from hires.checkpoints.few_step.applied import as_profile, fits
from hires.checkpoints.few_step.profiles import Match, match, names_of
from hires.checkpoints.headers import Header, read_header
from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError
from hires.options.lora import COUNTS, LoraRef

FOLDER_FILES = ("pytorch_lora_weights.safetensors", PEFT_FILE)
TEXT_COMPONENTS = (TEXT, TEXT_2)


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
    return tuple(ref for ref in loras if changed_towers(read_header(lora_file(ref))).total())


def changed_towers(header: Header) -> Counter[str]:
    """How many keys of a LoRA are for each text tower."""
    components = (component_of(name) for name in header.tensors if not name.startswith(IDLE))
    return Counter(found[0] for found in components if found is not None and found[0] in TEXT_COMPONENTS)


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
            raise _no_lora(header)
        check_family(finding, spec)
        read_layers(header)
        _check_blocks(ref, path, spec)
        told = lora_profile(path, header)
        if told is not None and profile is None and ref.scale != 0:
            spec = _profiled(spec, told, path)
        spec = replace(spec, notes=(*spec.notes, *_notes(ref, finding)))
    return spec


def _no_lora(header: Header) -> ModelError:
    """Why a file cannot be merged, by the name of what it is."""
    kind = other_kind(header)
    if kind is not None:
        return ModelError(f"loras {header.path}: is {kind}")
    few = ", ".join(sorted(header.tensors)[:3]) or "no tensors"
    return ModelError(
        f"loras {header.path}: holds no LoRA layers (but {few}); give a LoRA of kohya's, diffusers' or peft's keys"
    )


def _notes(ref: LoraRef, finding: Finding) -> tuple[str, ...]:
    """What a plan says about a LoRA: its strengths and kind, the embeddings that it brings, what of it has no place."""
    assert finding.header is not None
    name = finding.path.name
    notes = [f"LoRA {name} merged at {ref.strengths}: {finding.why[0]}"]
    embeddings = bundled_embeddings(finding.header)
    if embeddings:
        notes.append(f"LoRA {name} brings the embeddings {', '.join(embeddings)}: write their names in the prompt")
    idle = _unmoved(finding.header)
    if idle:
        notes.append(f"LoRA {name}: alpha is 0 in {idle} of its layers, which change nothing")
    if any(key.startswith(IDLE) for key in finding.header.tensors):
        notes.append(f"LoRA {name}: the projection of CLIP-L is left out, no picture depends on it")
    return tuple(notes)


def _unmoved(header: Header) -> int:
    """How many layers have a product of factors times an alpha of 0."""
    layers, _ = split_keys(header.tensors)
    products = {"down", "hada_w1_b", "a1", "lokr_w1_b", "lokr_w2_b"}
    other = {"scale", "dora_scale", "magnitude"}
    scaled = (keys for keys in layers.values() if products & keys.keys() and not other & keys.keys())
    return sum(header.scalars.get(keys.get("alpha", ""), 1.0) == 0 for keys in scaled)


def _check_blocks(ref: LoraRef, path: Path, spec: ModelSpec) -> None:
    """ModelError where the model has not the blocks that a list of weights is for."""
    if not ref.blocks:
        return
    if not isinstance(spec.network, UNetShape):
        raise ModelError(f"loras {path}: lbw weighs the blocks of a UNet, {spec.name} is {spec.family}; leave it out")
    fitting = (12, 20) if len(spec.network.channels) == 3 else (17, 26)
    if len(ref.blocks) not in fitting:
        raise ModelError(
            f"loras {path}: lbw has {len(ref.blocks)} block weights, {spec.name} ({spec.family}) takes {fitting[0]} "
            f"or {fitting[1]}: {COUNTS}"
        )


def check_family(finding: Finding, spec: ModelSpec) -> None:
    """ModelError where a LoRA was made for another family than the model's, both named."""
    made_for = f"is for {finding.family}" if finding.family else "was made for another layout"
    refusal = f"loras {finding.path}: {made_for} ({'; '.join(finding.why)}), the model {spec.name} is {spec.family}"
    unet, pixart = isinstance(spec.network, UNetShape), finding.family == "pixart"
    other = finding.family in ("sdxl", "sd15") and finding.context is None and finding.family != spec.facts.configs
    if unet == pixart or other or finding.family in FOREIGN.values():
        raise ModelError(f"{refusal}; leave it out, or give a model of its family")
    if isinstance(spec.network, UNetShape) and finding.context not in (None, spec.network.context_width):
        raise ModelError(
            f"{refusal}, whose text is {spec.network.context_width} wide; leave it out, or give a model of its family"
        )
    assert finding.header is not None
    taking = () if spec.facts.text == ("t5",) else TEXT_COMPONENTS[: len(spec.facts.text)]
    towers = sum(count for tower, count in changed_towers(finding.header).items() if tower not in taking)
    if towers:
        raise ModelError(f"{refusal}: {towers} of its keys are for a text tower that takes none here; leave it out")


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
