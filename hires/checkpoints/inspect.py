"""Describes a checkpoint: what it is and why, what it lacks, how to run it.

Reads headers only.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hires.checkpoints.adapters.loras import lora_profile
from hires.checkpoints.configs import PIXART_TABLES, below
from hires.checkpoints.detect_file import Finding
from hires.checkpoints.few_step.applied import profiled
from hires.checkpoints.headers import TensorInfo, folder_tensors, read_header
from hires.checkpoints.locate import TOKENIZERS, Part, find_model, next_move
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import identify, parts_folder, spec_of, unknown_layout
from hires.options.declarations import ModelOptions, SizeOptions
from hires.options.fields import flags_of
from hires.units import Json

KINDS = {
    "ldm": "a single file in latent diffusion's naming",
    "diffusers file": "a UNet of diffusers in one file",
    "diffusers": "a diffusers folder",
    "pixart": "an original PixArt file",
}
"""What each layout is, for people."""
FLAGS = flags_of(ModelOptions, SizeOptions)
"""How the command lines that are shown spell their options."""


@dataclass(frozen=True, slots=True, repr=False)
class Inspection:
    """What is known of a checkpoint, LoRA or autoencoder. Printed, it is the text of `hires inspect`."""

    document: Json
    """All of it as JSON values: what `hires inspect --json` prints."""

    @property
    def kind(self) -> str:
        """`model`, `lora` or `vae`."""
        return str(self.document["kind"])

    @property
    def family(self) -> str | None:
        """Such as sdxl or cosxl; for a LoRA what it was made for, in words; None for an autoencoder."""
        return str(self.document["family"] or "") or None

    @property
    def missing(self) -> tuple[str, ...]:
        """Components that a render would lack: tokenizers, text encoders, VAE."""
        return tuple(str(gap["component"]) for gap in self.document.get("missing", ()))

    def explain(self) -> str:
        """What it is and why, what it holds, what it lacks, and how to run it, in a few lines."""
        return "\n".join(lines(self.document))

    def to_json(self) -> Json:
        """The document."""
        return self.document

    def __repr__(self) -> str:
        return self.explain()


def inspect(name: str | Path, *, family: str | None = None, parts: str | Path | None = None) -> Inspection:
    """Tell what a checkpoint, a LoRA or an autoencoder is and why, what it holds, what it lacks, and how to run it.

    Reads headers and configs only, no tensor; torch is not loaded.

    Args:
        name: demo, a .safetensors or .pth file, a diffusers folder, or org/name on the hub.
        family: what it is where its keys are those of several, such as sdxl-turbo.
        parts: a diffusers folder with parts that it lacks: tokenizers, text encoders, VAE.

    Returns:
        An Inspection: printed it is a few lines for people, `to_json()` gives plain values.

    Raises:
        ModelError: a file that is not there, damaged, of no known kind, or not what `family` says. RequestError: a folder of
            parts that is none.
    """
    name = str(name)
    path = find_model(name)
    try:
        finding = identify(path, family)
        if finding.kind != "model":
            return Inspection(_part_alone(finding))
        spec = profiled(spec_of(name, finding, parts_folder(parts)), finding, family, None)
        return Inspection(_model(name, finding, spec, family, parts))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise unknown_layout(path, error) from None


def _model(name: str, finding: Finding, spec: ModelSpec, family: str | None, parts: str | Path | None) -> Json:
    return {
        "path": str(finding.path),
        "kind": "model",
        "layout": finding.layout,
        "storage": (finding.header.storage if finding.header else "") or None,
        "family": spec.family,
        "title": spec.facts.title,
        "why": list(finding.why),
        "notes": list(spec.notes),
        "parameterisation": spec.parameterisation,
        "sigma_min": spec.sigma_min,
        "sigma_max": spec.sigma_max,
        "sigma_from_file": finding.sigma_range is not None,
        "zero_terminal_snr": spec.zero_terminal_snr,
        "native_px": spec.native_px,
        "profile": None if spec.profile is None else spec.profile.name,
        "components": {part.component: contents(part) for part in spec.parts.values()},
        "defaults": asdict(spec.defaults),
        "missing": [
            {"component": part.component, "looked_in": list(part.looked_in), "next": next_move([part.component], spec.facts)}
            for part in spec.missing
        ],
        "next_move": next_move([part.component for part in spec.missing], spec.facts) if spec.missing else None,
        "command": command(name, spec, family, parts),
    }


def _part_alone(finding: Finding) -> Json:
    """A LoRA or an autoencoder."""
    tensors = finding.header.tensors if finding.header else folder_tensors(finding.path)
    document = {
        "path": str(finding.path),
        "kind": finding.kind,
        "layout": finding.layout,
        "family": finding.family,
        "why": list(finding.why),
        **summary(tensors),
    }
    if finding.kind == "lora" and finding.header is not None:
        told = lora_profile(finding.path, finding.header)
        document["profile"] = None if told is None else told.profile.name
        lora = f"{FLAGS['loras']} {shlex.quote(str(finding.path))}:1"
        document["command"] = f"hires render PROMPT {FLAGS['size']} WxH {FLAGS['model']} MODEL {lora} -o out.png"
    return document


def contents(part: Part) -> Json:
    """Where a component is and what its tensors take; nulls for what is missing or no network.

    layout: how its keys are named, 'shipped' for a vocabulary that comes with hires, 'missing' for what was not found.
    """
    shipped = part.path is not None and part.path.is_relative_to(TOKENIZERS)
    where = {
        "layout": "shipped" if shipped else part.layout,
        "path": None if part.path is None else str(part.path),
    }
    if part.path is None or part.component.startswith("tokenizer"):
        return where | {"parameters": None, "bytes": None, "dtypes": []}
    if part.layout == "diffusers":
        return where | summary(folder_tensors(part.path))
    tensors = read_header(part.path).tensors
    return where | summary(
        {name: tensors[part.prefix + name] for name in below(_shapes(tensors), part.prefix) if name not in PIXART_TABLES}
    )


def _shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.items()}


def summary(tensors: Mapping[str, TensorInfo]) -> Json:
    """Parameters, bytes, and dtypes with the one of most parameters first."""
    counts: Counter[str] = Counter()
    for info in tensors.values():
        counts[info.dtype] += info.count
    return {
        "parameters": counts.total(),
        "bytes": sum(info.nbytes for info in tensors.values()),
        "dtypes": [name for name, _ in counts.most_common()],
    }


def command(name: str, spec: ModelSpec, family: str | None, parts: str | Path | None) -> str:
    """The command line that runs the model."""
    given = {"model": name, "family": family, "parts": parts}
    rest = " ".join(f"{FLAGS[option]} {shlex.quote(str(value))}" for option, value in given.items() if value)
    if spec.facts.image_channels:
        return f'hires edit IN.png "make it winter" {rest} -o out.png'
    return f'hires render "a lighthouse at dusk" {FLAGS["size"]} {spec.native_px}x{spec.native_px} {rest} -o out.png'


def lines(document: Json) -> list[str]:
    """The same for people."""
    if document["kind"] != "model":
        what = "LoRA" if document["kind"] == "lora" else "small autoencoder" if document["layout"] == "tiny" else "autoencoder"
        made_for = f" for {document['family']}" if document["family"] else ""
        size = f"{document['parameters'] / 1e6:.2f} M parameters, {document['bytes']:,} bytes, {', '.join(document['dtypes'])}"
        profile = document.get("profile")
        extra = [f"  profile    {profile}: a run with it takes few steps, unless `few_step` is none"] if profile else []
        return [
            f"{document['path']}: {what}{made_for}",
            f"  why        {'; '.join(document['why'])}",
            f"  size       {size}",
            *extra,
        ]
    source = "read from the file" if document["sigma_from_file"] else "of the family"
    run, sigmas = document["defaults"], f"{document['sigma_min']:.4g} to {document['sigma_max']:.6g}"
    result = [
        f"{document['path']}: {document['title']} ({document['family']})",
        f"  kind       {KINDS[document['layout']]}",
        *(f"  why        {reason}" for reason in document["why"]),
        *(f"  note       {note}" for note in document["notes"]),
        f"  predicts   {document['parameterisation']}, sigma {sigmas} ({source})",
        *([f"  stored     {document['storage']}"] if document["storage"] else []),
        f"  native     {document['native_px']} px",
        f"  profile    {document['profile'] or 'none'}",
        f"  defaults   {run['steps']} steps of {run['sampler']}, schedule {run['schedule']}, guidance {run['guidance']:g}",
    ]
    for component, held in document["components"].items():
        size = ""
        if held["parameters"]:
            size = f"{held['parameters'] / 1e6:9.2f} M  {held['bytes']:>14,} bytes  {'+'.join(held['dtypes'])}"
        result.append(f"  {component:<15} {held['layout']:<14} {size}")
    result += [f"  missing    {gap['component']}, looked in {', '.join(gap['looked_in'])}" for gap in document["missing"]]
    result += [f"  first      {document['next_move']}"] if document["missing"] else []
    return [*result, f"  run it     {document['command']}"]
