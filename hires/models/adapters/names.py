"""Finds the weight that a layer's name in an adapter file stands for: tables made from the model's own keys.

A name with underscores for dots cannot be split again, so it is never split, only looked up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hires.checkpoints.configs import ldm_unet_names
from hires.checkpoints.families import UNetShape
from hires.checkpoints.model import ModelSpec
from hires.models.state_dicts import pixart_names

_OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_JOINT = tuple(f"self_attn.{name}_proj" for name in "qkv")
_OPEN_CLIP_OUTSIDE = {"final_layer_norm": "ln_final", "embeddings.token_embedding": "token_embedding"}
_PIXART_BLOCK = (
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp.fc1",
    "mlp.fc2",
)
_PIXART_OUTSIDE = (
    *("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "final_layer.linear"),
    *("y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"),
)


@dataclass(frozen=True, slots=True)
class Target:
    """A layer of the model that a name stands for."""

    module: str
    """Its name in the model."""
    part: int = 0
    """Which of `parts` equal runs of rows it has in a joint projection."""
    parts: int = 1


Targets = Mapping[str, tuple[Target, ...]]


def modules_of(names: Iterable[str]) -> list[str]:
    """The layers that have a weight or a bias."""
    return sorted({name.rpartition(".")[0] for name in names if name.endswith((".weight", ".bias"))})


def network_targets(names: Iterable[str], spec: ModelSpec) -> Targets:
    """The layers of a network by every name that files have for them: diffusers', the original one, either with underscores."""
    modules = modules_of(names)
    table: dict[str, tuple[Target, ...]] = {name: (Target(name),) for name in modules}
    table |= {name.removesuffix(".0"): (Target(name),) for name in modules if name.endswith(".to_out.0")}
    if isinstance(spec.network, UNetShape):
        table |= {other: (Target(name),) for name, other in ldm_unet_names(modules, spec.network.resnets).items()}
    else:
        table |= _pixart_targets(modules)
    return _flat(table)


def tower_targets(names: Iterable[str]) -> Targets:
    """The layers of a CLIP tower by every name: transformers' with or without text_model, OpenCLIP's, with underscores."""
    table: dict[str, tuple[Target, ...]] = {}
    for name in modules_of(names):
        bare = name.removeprefix("text_model.")
        table |= dict.fromkeys((bare, f"text_model.{bare}"), (Target(name),))
    return _flat(table | _open_clip_targets(table))


def _flat(table: Targets) -> Targets:
    return {name.replace(".", "_"): targets for name, targets in table.items()} | dict(table)


def _open_clip_targets(table: Targets) -> dict[str, tuple[Target, ...]]:
    """OpenCLIP's names of a tower's layers; its queries, keys and values are one projection, in thirds of its rows."""
    result: dict[str, tuple[Target, ...]] = {}
    joint: dict[str, dict[int, Target]] = defaultdict(dict)
    for name, (target,) in table.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            if name in _OPEN_CLIP_OUTSIDE:
                result[_OPEN_CLIP_OUTSIDE[name]] = (target,)
            continue
        stem = f"transformer.resblocks.{match[1]}"
        if match[2] in _OPEN_CLIP:
            result[f"{stem}.{_OPEN_CLIP[match[2]]}"] = (target,)
        if match[2] in _OPEN_CLIP_JOINT:
            part = _OPEN_CLIP_JOINT.index(match[2])
            joint[f"{stem}.attn.in_proj"][part] = Target(target.module, part, 3)
    return result | {name: tuple(parts[i] for i in range(3)) for name, parts in joint.items() if len(parts) == 3}


def _pixart_targets(modules: Iterable[str]) -> dict[str, tuple[Target, ...]]:
    """The original names of a PixArt's layers, joint projections in equal runs of rows."""
    known = set(modules)
    blocks = {match[1] for name in known if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    originals = [*_PIXART_OUTSIDE, *(f"blocks.{block}.{stem}" for block in blocks for stem in _PIXART_BLOCK)]
    result = {}
    for original in originals:
        names = [name.removesuffix(".weight") for name in pixart_names(f"{original}.weight")]
        if names and known.issuperset(names):
            result[original] = tuple(Target(name, i, len(names)) for i, name in enumerate(names))
    return result


def unet_blocks(names: Iterable[str], spec: ModelSpec) -> dict[str, str]:
    """The block of each layer of a UNet, as block weights name them: 'IN04', 'M00', 'OUT05'. Layers outside all have none."""
    if not isinstance(spec.network, UNetShape):
        return {}
    blocks = {}
    for name, other in ldm_unet_names(modules_of(names), spec.network.resnets).items():
        match = re.match(r"(input|output)_blocks\.(\d+)\.", other)
        if match is not None:
            blocks[name] = f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
        elif other.startswith("middle_block."):
            blocks[name] = "M00"
    return blocks
