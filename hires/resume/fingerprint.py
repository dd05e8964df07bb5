"""Describes a render as JSON, so that a journal notices any change of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hires._version import __version__
from hires.checkpoints.adapters.embeddings import prompts_of
from hires.checkpoints.adapters.loras import lora_files
from hires.checkpoints.model import ModelSpec
from hires.options.render import RenderRequest
from hires.planning.plan import MemoryPlan
from hires.prompts.embeddings import EmbeddingFile
from hires.prompts.request import ANY_STEPS
from hires.prompts.script import write_script
from hires.units import Json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


SCHEMA = 3
"""Raised whenever the same request draws another image or is recorded otherwise; 3: masks blend exactly at 0 and 1."""

READ_WHOLE = 2**26  # bytes of the largest file that is read whole for its fingerprint
PROBES, PROBED = 2048, 2**12  # how many bytes are read of a larger one, and in how many places
NOT_DRAWN = ("attention", "tiny_vae")  # how it runs, not what it draws
FILES = ("model", "parts", "vae", "lora_dir", "embeddings", "loras")  # known by what is in them, wherever they lie
DRAWN = ("canvas", "stages", "dtype", "text_dtype", "weights")
"""What of a plan decides the picture, beside the type that the autoencoder runs in."""
DRAWS = ("family", "parameterisation", "sigma_min", "sigma_max", "vp_betas", "zero_terminal_snr")
"""What configs say of a model beside its weights."""


def describe_request(request: RenderRequest, spec: ModelSpec, pictures: Iterable[NDArray[np.uint8] | None] = ()) -> Json:
    """What was asked for: the request, and fingerprints of the model's files and of given pictures."""
    options = dataclasses.asdict(request) | {"size": str(request.size)}
    return {
        "schema": SCHEMA,
        "request": {name: value for name, value in options.items() if name not in (*NOT_DRAWN, *FILES)},
        "loras": [lora.strengths for lora in request.loras],
        "model": fingerprints(spec, [file for lora in request.loras for file in lora_files(lora)]),
        "embeddings": {file.name: fingerprint(file.path) for file in embeddings_of(request, spec)},
        "pictures": [None if p is None else hashlib.blake2b(p.tobytes(), digest_size=16).hexdigest() for p in pictures],
    }


def embeddings_of(request: RenderRequest, spec: ModelSpec) -> list[EmbeddingFile]:
    """The embeddings whose name is in a prompt of a request, each once."""
    script = write_script(prompts_of(request, spec), ANY_STEPS)
    files = {file.name: file for text in script.texts for file in text.embeddings}
    return [files[name] for name in sorted(files)]


def describe_job(
    request: RenderRequest, plan: MemoryPlan, spec: ModelSpec, pictures: Iterable[NDArray[np.uint8] | None] = ()
) -> Json:
    """What was asked for, with versions and the plan's part that decides the picture."""
    import torch

    drawn = dataclasses.replace(plan, stages=tuple(replace(stage, batch=1) for stage in plan.stages)).to_json()
    return describe_request(request, spec, pictures) | {
        "hires": __version__,
        "torch": torch.__version__,
        "plan": {name: drawn[name] for name in DRAWN} | {"decode": plan.decode.dtype},
    }


def mark_of(described: Json, spec: ModelSpec, bits: int) -> str:
    """A text that a finished file is known by: what `describe_request` gives, how its model draws, and the bits of a value.

    The plan is no part of it: a request that ran with another budget or on another machine is the same request.
    """
    model = {name: getattr(spec, name) for name in DRAWS} | dataclasses.asdict(spec.defaults)
    content = json.dumps(described | {"bits": bits, "draws": model}, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def fingerprints(spec: ModelSpec, loras: Sequence[Path] = ()) -> dict[str, str]:
    """The fingerprint of each file that a model is loaded from, by the first part that is read from it."""
    places: dict[Path, str] = {}
    for component, part in sorted(spec.parts.items()):
        if part.path is not None:
            places.setdefault(part.path, component)
    digests = {}
    for path, name in (*places.items(), *((path.expanduser(), f"lora {i}") for i, path in enumerate(loras))):
        for file in sorted(path.rglob("*")) if path.is_dir() else (path,):
            if file.is_file():
                digests["/".join((name, *file.relative_to(path).parts))] = fingerprint(file)
    return digests


def fingerprint(file: Path) -> str:
    """'1048576:9f…': its bytes, and a digest: of all of them up to 64 MiB, else of 2048 places of 4 KiB, both ends included.

    A file is changed between the places only where less than a 2048th of it is: a LoRA that was merged, another training or
    another precision change them all, one value of a large file may be missed.
    """
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        if size <= READ_WHOLE:
            digest.update(opened.read())
        else:
            for place in range(PROBES):
                opened.seek(place * (size - PROBED) // (PROBES - 1))
                digest.update(opened.read(PROBED))
    return f"{size}:{digest.hexdigest()}"
