"""Tells what a LoRA was made for and of which kinds it is, from its header; names add-ons of other kinds.

Imports no torch and reads no tensor.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hires.checkpoints.adapters.keys import EMBEDDINGS, KINDS, MODIFIERS, TEXT_2, component_of, split_keys
from hires.checkpoints.headers import Header

UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")
LORA_UNETS = {2048: "sdxl", 768: "sd15", 1024: "Stable Diffusion 2"}
FOREIGN = {
    r"motion_modules": "AnimateDiff",
    r"lora_prior_unet_": "Stable Cascade",
    r"double_blocks|single_blocks|single_transformer_blocks": "Flux or Hunyuan Video",
    r"img_mod|img_mlp": "Qwen-Image",
    r"joint_blocks|add_q_proj|lora_te3_|text_encoder_3\.": "Stable Diffusion 3",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn[._][qkvo]($|\.)|ffn)": "Wan",
    r"(diffusion_model|transformer)\.layers\.\d+\.": "Lumina 2 or Z-Image",
}
"""What a part of a layer's name says of families that are not supported; a UNet's blocks go first."""
_SD15_BLOCKS = re.compile(r"(down_blocks.0.attentions|input_blocks.[12].1|output_blocks.(9|10|11).|(down|up)_blocks.3.)")
_SDXL_BLOCKS = re.compile(r"transformer_blocks.[1-9]")
_EMBEDDING = "a textual inversion embedding; put it in a prompt as embedding:name"
OTHER_KINDS = (
    (r"(^|\.)image_proj\.|(^|\.)ip_adapter\.|to_k_ip\.", "an IP-Adapter, which is not supported"),
    (r"(^|\.)body\.\d+\.(resnets\.\d+\.)?(block1|in_conv)\.", "a T2I-Adapter, which is not supported"),
    (r"^lora_controlnet$", "a control-LoRA, which is not supported"),
    (
        r"^control_model\.|^controlnet_cond_embedding\.|^(input_hint_block|zero_convs|controlnet_down_blocks)\.",
        "a ControlNet, which is not supported",
    ),
    (r"^\d+\.[01]\.(linear\.\d+|bias|\d+)", "a hypernetwork, which is not supported; leave it out"),
    (r"\.vera_lambda_[bd]", "a VeRA adapter, which is not supported"),
    (r"\.ia3_l(\.|$)", "an (IA)³ of peft's keys, which is not supported; LyCORIS' are"),
    (r"\.hra_u(\.|$)", "an HRA adapter, which is not supported"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding layer in peft's keys, which is not supported"),
    (r"^string_to_param\.|^emb_params$", _EMBEDDING),
)
"""What the names of tensors say of add-ons and files that are no LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFacts:
    """What a LoRA's header tells."""

    family: str
    """sdxl, sd15 or pixart, another family in words, or '' where the keys do not tell."""
    context: int | None
    """The width of the text that its cross-attention reads; None where no layer says."""
    why: tuple[str, ...]
    """The keys and values that decided."""


def lora_facts(header: Header) -> LoraFacts | None:
    """What a LoRA of any kind was made for; None for a file that is no LoRA."""
    if _add_on(header) is not None:
        return None
    layers, _ = split_keys(header.tensors)
    layers = {module: keys for module, keys in layers.items() if _changes(module, keys)}
    if not layers:
        return None
    context = next((width for module, keys in layers.items() if (width := _context(header, module, keys))), None)
    family = _family(layers, context)
    why: tuple[str, ...] = (*_kinds(header, layers), f"such as {min(key for keys in layers.values() for key in keys.values())}")
    if context:
        why = (*why, f"cross-attention reads text of width {context}")
    return LoraFacts(family=family, context=context, why=why)


def _changes(module: str, keys: Mapping[str, str]) -> bool:
    """Whether a layer holds a change: its factors tell, those that other files may have too only below a known prefix."""
    telling = keys.keys() - MODIFIERS
    return bool(telling & {"up", "down"}) or (bool(telling) and component_of(module) is not None)


def _kinds(header: Header, layers: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """How many layers there are of each kind: '12 LoRA layers of rank 4, 8', '3 LoKr layers with DoRA'."""
    counts: Counter[str] = Counter()
    ranks: set[int] = set()
    for keys in layers.values():
        for kind in KINDS.values():
            if kind.named & keys.keys():
                dora = " with DoRA" if {"dora_scale", "magnitude"} & keys.keys() else ""
                tucker = " (Tucker)" if {"mid", "hada_t1", "lokr_t2"} & keys.keys() else ""
                title = "BOFT" if _is_boft(header, keys) else kind.title
                counts[f"{title} layers{tucker}{dora}"] += 1
                ranks |= {side for role, key in keys.items() if role == "down" for side in header.tensors[key].shape[:1]}
    told = f" of rank {', '.join(map(str, sorted(ranks)))}" if ranks else ""
    return tuple(f"{count} {title}{told if title.startswith('LoRA') else ''}" for title, count in counts.most_common())


def _is_boft(header: Header, keys: Mapping[str, str]) -> bool:
    return "oft_blocks" in keys and len(header.tensors[keys["oft_blocks"]].shape) == 4


def _family(layers: Iterable[str], context: int | None) -> str:
    """The family that layers are of, '' where nothing tells."""
    names = list(layers)
    unet = any(block in name for name in names for block in UNET_BLOCKS)
    foreign = next((family for mark, family in FOREIGN.items() if any(re.search(mark, name) for name in names)), None)
    if foreign is not None and (not unet or foreign == "AnimateDiff"):
        return foreign
    second = any((component_of(name) or ("", ""))[0] == TEXT_2 for name in names)
    if unet and context:
        return LORA_UNETS.get(context, f"a UNet with a text width of {context}")
    if unet and any(_SDXL_BLOCKS.search(name) for name in names):
        return "sdxl"
    if unet and not second and any(_SD15_BLOCKS.search(name) for name in names):
        return "sd15"
    if not unet and any("transformer_blocks" in name or "cross_attn" in name for name in names):
        return "pixart"
    return "sdxl" if second else ""


def _context(header: Header, module: str, keys: Mapping[str, str]) -> int | None:
    """The width of the text that a layer of cross-attention reads."""
    if "attn2" not in module or not re.search(r"to.[kv]($|[._])", module):
        return None
    shapes = {role: header.tensors[key].shape for role, key in keys.items()}
    if any(len(shape) < 2 for role, shape in shapes.items() if role not in MODIFIERS | {"diff_b", "on_input", "weight"}):
        return None
    return _input_width(shapes)


def _input_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The input width of a linear layer by the shapes of its factors; None where they do not tell."""
    for role in ("down", "hada_w1_b", "diff", "set_weight"):
        if role in shapes:
            return shapes[role][1]
    if "lokr_w1" in shapes or "lokr_w1_b" in shapes:
        first, second = (shapes.get(f"lokr_w{i}") or shapes.get(f"lokr_w{i}_b") for i in (1, 2))
        return first[1] * second[1] if first and second else None
    if "a1" in shapes:
        return max(shapes["a1"])
    if "boft_R" in shapes and len(shapes["boft_R"]) == 4:
        return shapes["boft_R"][1] * shapes["boft_R"][2]
    return None


def other_kind(header: Header) -> str | None:
    """An add-on or file of another kind, by its name and with the next move: 'an IP-Adapter, which is not supported'."""
    names = header.tensors
    add_on = _add_on(header)
    if add_on is not None:
        return add_on
    if set(names) in ({"clip_l", "clip_g"}, {"clip_l"}, {"clip_g"}):
        return _EMBEDDING
    alone = [info for name, info in names.items() if "." not in name]
    if len(names) == 1 and alone and len(alone[0].shape) in (1, 2) and alone[0].shape[-1] in (768, 1024, 1280):
        return _EMBEDDING
    if any(name.startswith(("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.")) for name in names):
        return "a whole checkpoint; give it with `model`"
    return None


def _add_on(header: Header) -> str | None:
    return next((what for mark, what in OTHER_KINDS if any(re.search(mark, name) for name in header.tensors)), None)


def bundled_embeddings(header: Header) -> tuple[str, ...]:
    """The names of the textual inversion embeddings that a LoRA brings along (`bundle_emb.NAME.…`)."""
    names = set()
    for key in header.tensors:
        if key.startswith(EMBEDDINGS):
            whole = key.removeprefix(EMBEDDINGS)
            names.add(whole.split(".string_to_param")[0] if ".string_to_param" in whole else whole.rpartition(".")[0] or whole)
    return tuple(sorted(names))
