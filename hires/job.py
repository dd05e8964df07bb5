"""What makes a render the render it is, as plain JSON: for a journal that must notice when anything of it changed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires import __version__
from hires.specs import ModelSpec
from hires.types import MemoryPlan, RenderRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 1
PROBED = 2**20  # bytes read of either end of a large file
NOT_DRAWN = ("attention", "tiny_vae")  # how it runs, not what it draws


def describe_job(
    request: RenderRequest, plan: MemoryPlan, spec: ModelSpec, pictures: Iterable[NDArray[np.uint8] | None] = ()
) -> dict[str, Any]:
    """Versions, request, the plan's part that decides the picture, fingerprints of the model's files and of given pictures."""
    import torch

    asked = dataclasses.asdict(request) | {"size": str(request.size)}
    drawn = dataclasses.replace(plan, stages=tuple(replace(stage, batch=1) for stage in plan.stages)).to_json()
    return {
        "schema": SCHEMA,
        "hires": __version__,
        "torch": torch.__version__,
        "request": {name: value for name, value in asked.items() if name not in NOT_DRAWN},
        "plan": {name: drawn[name] for name in ("canvas", "stages", "dtype", "text_dtype")} | {"decode": plan.decode.dtype},
        "model": fingerprints(spec, [Path(lora.path) for lora in request.loras]),
        "pictures": [None if p is None else hashlib.blake2b(p.tobytes(), digest_size=16).hexdigest() for p in pictures],
    }


def fingerprints(spec: ModelSpec, more: Iterable[Path] = ()) -> dict[str, str]:
    """Every file that a model is loaded from, by name: its bytes, and a digest of both its ends."""
    paths = [part.path for part in spec.parts.values() if part.path is not None]
    files = {file for path in (*paths, *more) for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()}
    return {f"{file.parent.name}/{file.name}": fingerprint(file) for file in sorted(files)}


def fingerprint(file: Path) -> str:
    """'1048576:9f…': size, and the digest of the first and last mebibyte."""
    size, digest = file.stat().st_size, hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        digest.update(opened.read(PROBED))
        if size > PROBED:
            opened.seek(max(PROBED, size - PROBED))
            digest.update(opened.read(PROBED))
    return f"{size}:{digest.hexdigest()}"
