"""Merges LoRAs of every kind into weights as they are loaded.

Each change is computed from the weight of the model's own file, in float32, and all are added to it: W + sum of changes. So the
order of LoRAs does not matter but for rounding, also where a kind is not linear in W (DoRA, OFT, BOFT, GLoRA, (IA)³).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hires.checkpoints.adapters.keys import NETWORK, AdapterLayer, read_layers
from hires.checkpoints.adapters.loras import lora_file
from hires.checkpoints.adapters.stated import Stated, stated_beside
from hires.checkpoints.headers import read_header
from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError
from hires.models.adapters.change import Change
from hires.models.adapters.full import difference, replacement
from hires.models.adapters.low_rank import glora, ia3, loha, lokr, lora
from hires.models.adapters.names import Target, Targets, network_targets, tower_targets, unet_blocks
from hires.models.adapters.rotations import oft, peft_boft, peft_oft
from hires.models.state_dicts import read_tensors
from hires.options.lora import LoraRef
from hires.tiling.retry import is_out_of_memory

FORMULAS: Mapping[str, Callable[[Change, Tensor], Tensor]] = {
    "lora": lora,
    "loha": loha,
    "lokr": lokr,
    "glora": glora,
    "ia3": ia3,
    "oft": oft,
    "peft_oft": peft_oft,
    "peft_boft": peft_boft,
    "diff": difference,
    "diff_b": difference,
    "set": replacement,
    "w_norm": difference,
    "b_norm": difference,
}
"""What each kind adds to the weight W of the model's file."""
WIDENED = "conv_in.weight"
"""The weight that models for editing and inpainting give more input channels, which a LoRA of their base leaves alone."""


def merged(weight: Tensor, changes: Sequence[Change]) -> Tensor:
    """W + the sum of changes, in float32 (in float64 where W is); the weight itself where there are none.

    ModelError names the file and the layer whose factors do not fit, or are not finite.
    """
    if not changes:
        return weight
    if sum(change.kind == "set" for change in changes) > 1:
        both = " and ".join(change.where for change in changes if change.kind == "set")
        raise ModelError(f"{both}: both replace the same weight; leave one of them out")
    base = weight if weight.dtype == torch.float64 else weight.float()
    total = base
    for change in changes:
        total = total + _computed(change, base)
    return total


def _computed(change: Change, weight: Tensor) -> Tensor:
    try:
        delta = FORMULAS[change.kind](change, weight)
    except (RuntimeError, IndexError, ValueError, OverflowError) as error:
        if is_out_of_memory(error):
            raise
        raise change.misfit(weight) from None
    if not bool(torch.isfinite(delta.sum())):
        raise change.refusal("gives values that are not finite; the file is damaged, ask its author for a whole one")
    return delta


def network_layers(loras: Sequence[LoraRef], names: Collection[str], spec: ModelSpec) -> dict[str, list[Change]]:
    """The changes of the network by the parameter that each is for. ModelError for layers that fit none.

    Args:
        loras: in any order.
        names: the network's parameters under diffusers' names.
        spec: the model's facts.
    """
    targets, blocks = network_targets(names, spec), unet_blocks(names, spec)
    return _changes(loras, NETWORK, names, targets, lambda ref, module: ref.strength(blocks.get(module)))


def tower_layers(loras: Sequence[LoraRef], names: Collection[str], component: str) -> dict[str, list[Change]]:
    """The changes of one text tower by the parameter that each is for. ModelError for layers that fit none."""
    return _changes(loras, component, names, tower_targets(names), lambda ref, module: ref.text_strength)


def _changes(
    loras: Sequence[LoraRef],
    component: str,
    names: Collection[str],
    targets: Targets,
    strength: Callable[[LoraRef, str], float],
) -> dict[str, list[Change]]:
    changes: dict[str, list[Change]] = defaultdict(list)
    known = set(names)
    for ref in loras:
        path = lora_file(ref)
        layers = [layer for layer in read_layers(read_header(path)) if layer.component == component]
        stated = stated_beside(path)[component] if layers else Stated()
        tensors = read_tensors(path) if layers else {}
        lost, taken = [], dict[str, str]()
        for layer in layers:
            found = targets.get(layer.name, ())
            if not found or any(f"{target.module}.{layer.kind.leaf}" not in known for target in found):
                lost.append(layer.module)
                continue
            factors = {role: tensors[key] for role, key in layer.keys.items()}
            for target in found:
                parameter = f"{target.module}.{layer.kind.leaf}"
                if taken.setdefault(parameter, layer.module) != layer.module:
                    raise ModelError(
                        f"loras {path}: {taken[parameter]} and {layer.module} are two names of one weight; give it one change"
                    )
                change = _change(path, layer, target, factors, stated, strength(ref, target.module))
                changes[parameter].append(change)
        if lost:
            raise _lost(path, lost)
    return dict(changes)


def _change(
    path: Path, layer: AdapterLayer, target: Target, factors: Mapping[str, Tensor], stated: Stated, scale: float
) -> Change:
    parameter = f"{target.module}.{layer.kind.leaf}"
    return Change(
        where=f"loras {path}: {layer.module} ({layer.title})",
        kind=layer.kind.name,
        tensors=factors,
        scale=scale,
        name=layer.name,
        stated=stated,
        part=target.part,
        parts=target.parts,
        widens=layer.component == NETWORK and parameter == WIDENED,
    )


def _lost(path: Path, names: Sequence[str]) -> ModelError:
    few = ", ".join(sorted(names)[:3])
    return ModelError(
        f"loras {path}: {len(names)} of its layers fit nothing in the model, such as {few}; it is for another one"
    )
