"""Merges LoRAs into weights as they are loaded: W + scale alpha/r B A.

Hu et al. 2021 (arXiv 2106.09685).

Keys in kohya's style (SDXL's in latent diffusion's names or diffusers', flattened), in diffusers' old and new styles, and in
peft's. Linear and convolution layers of the network and of CLIP text towers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hires.checkpoints.configs import ldm_unet_names
from hires.checkpoints.families import UNetShape
from hires.checkpoints.headers import read_header
from hires.checkpoints.loras import CONFIG_FILE, PEFT_FILE, TOWERS, lora_file
from hires.checkpoints.spec import ModelSpec
from hires.errors import ModelError
from hires.models.state_dicts import read_tensors
from hires.options.lora import LoraRef

ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
NETWORK = ("lora_unet_", "unet.", "transformer.", "base_model.model.", "lora_transformer_")
COMPONENTS = dict(zip(("text_encoder", "text_encoder_2"), TOWERS, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """The factors of one layer's change."""

    where: str
    up: Tensor
    """(out, r) or (out, r, 1, 1)."""
    down: Tensor
    """(r, in) or (r, in, kh, kw)."""
    factor: float
    """scale alpha / r."""


def merged(weight: Tensor, layers: Sequence[LoraLayer]) -> Tensor:
    """W + sum factor up @ down, in float32; the weight itself where there are no layers. ModelError for another shape."""
    if not layers:
        return weight
    total = weight.float()
    for layer in layers:
        up, down = layer.up.flatten(1).float(), layer.down.flatten(1).float()
        rows, columns = weight.shape[0], weight.flatten(1).shape[1]
        if up.shape[0] != rows or down.shape[1] != columns or up.shape[1] != down.shape[0]:
            raise ModelError(
                f"{layer.where}: up {tuple(layer.up.shape)} and down {tuple(layer.down.shape)} do not fit a weight of "
                f"{tuple(weight.shape)}; the LoRA is for another model"
            )
        total = total + layer.factor * (up @ down.to(up.device)).reshape(weight.shape).to(total.device)
    return total


def network_layers(loras: Sequence[LoraRef], weights: Iterable[str], spec: ModelSpec) -> dict[str, list[LoraLayer]]:
    """The layers of the network by the name of the weight that each changes. ModelError for keys that fit none."""
    modules = [name.removesuffix(".weight") for name in weights]
    aliases = {name: name for name in modules}
    if isinstance(spec.network, UNetShape):
        aliases |= {other: name for name, other in ldm_unet_names(modules, spec.network.resnets).items()}
    aliases |= {other.replace(".", "_"): name for other, name in list(aliases.items())}
    return _layers(loras, NETWORK, aliases)


def tower_layers(loras: Sequence[LoraRef], weights: Iterable[str], component: str) -> dict[str, list[LoraLayer]]:
    """The layers of one text tower by the name of the weight that each changes. ModelError for keys that fit none."""
    aliases: dict[str, str] = {}
    for name in (name.removesuffix(".weight") for name in weights):
        bare = name.removeprefix("text_model.")
        for other in (bare, f"text_model.{bare}"):
            aliases |= {other: name, other.replace(".", "_"): name}
    return _layers(loras, COMPONENTS[component], aliases)


def _layers(loras: Sequence[LoraRef], prefixes: tuple[str, ...], aliases: Mapping[str, str]) -> dict[str, list[LoraLayer]]:
    layers: dict[str, list[LoraLayer]] = defaultdict(list)
    for ref in loras:
        path = lora_file(ref)
        lost = []
        for module, roles in grouped(path).items():
            prefix = next((p for p in prefixes if module.startswith(p)), None)
            if prefix is None:
                continue
            target = aliases.get(module.removeprefix(prefix))
            if target is None or not {"up", "down"} <= roles.keys():
                lost.append(module)
                continue
            rank = roles["down"].shape[0]
            alpha = float(roles["alpha"]) if "alpha" in roles else rank
            layers[f"{target}.weight"].append(
                LoraLayer(where=f"{path}: {module}", up=roles["up"], down=roles["down"], factor=ref.scale * alpha / rank)
            )
        if lost:
            raise _lost(path, lost)
    return dict(layers)


def _lost(path: Path, names: Sequence[str]) -> ModelError:
    few = ", ".join(sorted(names)[:3])
    return ModelError(
        f"loras {path}: {len(names)} of its layers fit nothing in the model, such as {few}; it is for another one"
    )


def grouped(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a LoRA file by layer and role ('up', 'down', 'alpha'). ModelError for keys of another kind."""
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    known = (*NETWORK, *(prefix for prefixes in TOWERS for prefix in prefixes))
    lost = []
    for key, value in read_tensors(path).items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is None or not key.startswith(known):
            lost.append(key)
            continue
        layers[_plain(key.removesuffix(end))][ENDS[end]] = value
    if lost:
        few = ", ".join(sorted(lost)[:3])
        raise ModelError(
            f"loras {path}: {len(lost)} keys are of no kind that can be merged, such as {few}; plain LoRA of linear and "
            f"convolution layers is supported, DoRA, LoHa and LoKr are not"
        )
    stated = stated_alpha(path)
    if stated is not None:
        for roles in layers.values():
            roles.setdefault("alpha", stated)
    return dict(layers)


def _plain(module: str) -> str:
    """A layer's name without what diffusers once put in between: '.attn1.processor.to_out' is '.attn1.to_out.0'."""
    if ".processor." in module:
        module = module.replace(".processor.", ".")
        module = f"{module}.0" if module.endswith(".to_out") else module
    return module


def stated_alpha(path: Path) -> Tensor | None:
    """The alpha that a peft or diffusers LoRA states beside its tensors, None where it states none (alpha = r)."""
    import torch

    beside = path.parent / CONFIG_FILE
    document: dict[str, object] = {}
    try:
        if path.name == PEFT_FILE and beside.is_file():
            document = json.loads(beside.read_text())
        else:
            document = json.loads(read_header(path).metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise ModelError(f"loras {path}: its configuration cannot be read ({error}); save the LoRA again") from None
    values = {value for key, value in document.items() if key.split(".")[-1] == "lora_alpha"}
    patterns = [key for key, value in document.items() if key.split(".")[-1] in ("alpha_pattern", "rank_pattern") and value]
    if len(values) > 1 or patterns or any(value is True for k, value in document.items() if k.split(".")[-1] == "use_rslora"):
        raise ModelError(f"loras {path}: has another alpha per layer ({patterns or values}); not supported, save it with one")
    return torch.tensor(float(str(values.pop()))) if values else None
