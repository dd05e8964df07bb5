"""`hires info`: device, backends, libraries and models."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import typer

from hires._version import __version__
from hires.cli.display import guarded
from hires.cli.options import AsJson
from hires.units import gib

if TYPE_CHECKING:
    from hires.checkpoints.model import ModelSpec


def info(as_json: AsJson = False) -> None:
    """Show the device, the attention backends with their reasons, libraries and models."""
    facts = guarded(collect_info)
    if as_json:
        print(json.dumps(facts))
        return
    for title, rows in facts.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<14} {value}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(info)


def collect_info() -> dict[str, dict[str, str]]:
    """What `hires info` prints, by section."""
    import importlib
    import importlib.metadata

    import torch

    from hires._imports import quiet_imports
    from hires.checkpoints.locate import NAMED_MODELS
    from hires.checkpoints.spec import load_spec
    from hires.devices.probe import choose_device, probe
    from hires.kernels import blend, group_norm
    from hires.kernels.dispatch import AttentionSpec, table

    device = choose_device("auto")
    facts = probe(device)
    dtype = torch.bfloat16 if facts.kind == "cuda" and facts.bf16 else torch.float32
    spec = AttentionSpec(device=device.type, dtype=dtype, head_dim=64, queries=4096, keys=4096, masked=False)
    maps = group_norm.MapSpec(device=device.type, dtype=dtype)
    libraries = {"hires": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "diffusers", "transformers", "triton", "xformers", "tifffile", "pyvips", "spandrel"):
        with quiet_imports() as messages:
            try:
                importlib.import_module(name)
                state = importlib.metadata.version(name)
            except ModuleNotFoundError as error:
                state = "not installed" if error.name == name else f"not usable: {error}"
            except Exception as error:  # any failure of an optional library is what this table is for
                state = f"not usable: {type(error).__name__}: {error}"
        libraries[name] = "; ".join([state, *(" ".join(line.split()) for line in messages)])
    lacking = [name for name in ("triton", "xformers") if libraries[name].startswith("not installed")]
    advice = {"card": f"{' and '.join(lacking)} missing: pip install -e '.[gpu]' in the folder of hires"} if lacking else {}
    return {
        "device": {"name": facts.name, "budget": gib(facts.budget_bytes), "bf16": "yes" if facts.bf16 else "no"} | advice,
        "attention backends": {name: reason or "runs" for name, reason in table(spec)},
        "group norm backends": {name: reason or "runs" for name, reason in group_norm.table(maps)},
        "blend backends": {name: reason or "runs" for name, reason in blend.table(maps)},
        "libraries": libraries,
        "models": {name: _describe(load_spec(name)) for name in NAMED_MODELS},
    }


def _describe(spec: ModelSpec) -> str:
    params = (spec.network_params + spec.text_params + spec.vae_params) / 1e6
    return f"{spec.family}, {spec.native_px} px native, {spec.parameterisation}, {params:.1f} M parameters, {spec.path}"
