"""Maps a single file's tensors to the names of diffusers and transformers.

They are mapped, not read.

The renaming of latent diffusion's UNet, VAE and OpenCLIP is that of diffusers; PixArt's is its authors' conversion table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from hires._imports import quiet_imports
from hires.checkpoints.configs import PIXART_TABLES, ldm_unet_names
from hires.errors import ModelError
from hires.models.storage.packed import Packed, mapped, widened
from hires.models.storage.reading import read_tensors, stored_tensors
from hires.units import Json

__all__ = ["read_tensors", "stored_tensors"]


def unet_state(path: Path, prefix: str, names: Mapping[str, str]) -> dict[str, Tensor | Packed]:
    """A UNet of one file under diffusers' names. names: the file's name, without `prefix`, of each tensor of the module.

    ModelError for tensors that have no place in it.
    """
    state = {name.removeprefix(prefix): value for name, value in stored_tensors(path, prefix).items()}
    left = sorted(state.keys() - set(names.values()) - LDM_MARKS)
    if left:
        raise ModelError(f"{path}: {len(left)} tensors fit no known place, such as {left[:1]}; not a model of this layout")
    return {name: state[stored] for name, stored in names.items() if stored in state}


LDM_MARKS = {"v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
"""Tensors beside those of a bare UNet that say how it was trained."""


def unet_names(modules: Iterable[str], resnets: int, layout: str) -> dict[str, str]:
    """The name in a file of each tensor of a diffusers UNet with `resnets` per level."""
    tensors = list(modules)
    if layout == "diffusers file":
        return {name: name for name in tensors}
    stems = ldm_unet_names({name.rpartition(".")[0] for name in tensors}, resnets)
    return {name: f"{stems[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in tensors}


def vae_state(path: Path, prefix: str, config: Json, layout: str = "ldm") -> dict[str, Tensor]:
    """An AutoencoderKL of one file under diffusers' names; its attention's 1x1 convolutions become linear."""
    with quiet_imports():
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    state = {
        key.removeprefix(prefix): widened(value)
        for key, value in stored_tensors(path, prefix).items()
        if key.removeprefix(prefix).startswith(VAE_PARTS)
    }
    if layout == "diffusers file":
        return {_new_attention(key): _as_linear(key, value) for key, value in state.items()}
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(state, dict(config))
    return _all_of(state, converted, path)


VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _new_attention(key: str) -> str:
    """A tensor of a VAE's attention under the name that diffusers has had since 0.17."""
    module, _, leaf = key.rpartition(".")
    stem, _, last = module.rpartition(".")
    return f"{stem}.{OLD_ATTENTION[last]}.{leaf}" if ".attentions." in key and last in OLD_ATTENTION else key


def _as_linear(key: str, value: Tensor) -> Tensor:
    """A VAE's attention by 1x1 convolutions as matrices; other tensors as they are."""
    return value[:, :, 0, 0] if ".attentions." in key and value.ndim == 4 else value


def _all_of(state: Mapping[str, Tensor], converted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The converted tensors; ModelError where the conversion left any out."""
    if len(converted) < len(state):
        shared = {value.data_ptr() for value in converted.values()}
        left = sorted(key for key, value in state.items() if value.data_ptr() not in shared)
        raise ModelError(f"{path}: {len(left)} tensors fit no known place, such as {left[:1]}; not a model of this layout")
    return converted


def clip_state(path: Path, prefix: str, wanted: Collection[str]) -> dict[str, Tensor | Packed]:
    """A CLIP text tower in transformers' naming of any version, under the names that are `wanted`."""
    state = {key.removeprefix(prefix): value for key, value in stored_tensors(path, prefix).items()}
    return fit_names({key: value for key, value in state.items() if not key.endswith("position_ids")}, wanted)


OPEN_CLIP_NAMES = (
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"token_embedding\.(.+)", r"embeddings.token_embedding.\1"),
    (r"ln_final\.(.+)", r"final_layer_norm.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(.+)", r"encoder.layers.\1.layer_norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(.+)", r"encoder.layers.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(.+)", r"encoder.layers.\1.mlp.fc2.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(.+)", r"encoder.layers.\1.self_attn.out_proj.\2"),
)
OPEN_CLIP_JOINT = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_?\.?(weight|bias)")


def open_clip_state(path: Path, prefix: str, wanted: Collection[str]) -> dict[str, Tensor | Packed]:
    """An OpenCLIP text tower under transformers' names: queries, keys and values apart, the projection transposed."""
    state: dict[str, Tensor | Packed] = {}
    for key, value in stored_tensors(path, prefix).items():
        name = key.removeprefix(prefix)
        joint = OPEN_CLIP_JOINT.fullmatch(name)
        if joint is not None:
            for index, side in enumerate("qkv"):
                state[f"encoder.layers.{joint[1]}.self_attn.{side}_proj.{joint[2]}"] = mapped(value, _third(index))
        elif name == "text_projection":
            state["text_projection.weight"] = mapped(value, lambda matrix: matrix.T.contiguous())
        elif name not in OPEN_CLIP_UNUSED:
            state[_open_clip_name(name)] = value
    return fit_names(state, wanted)


def _open_clip_name(name: str) -> str:
    """The name in transformers of an OpenCLIP tensor, or its own where that is unknown."""
    found = (match.expand(to) for at, to in OPEN_CLIP_NAMES if (match := re.fullmatch(at, name)))
    return next(found, name)


OPEN_CLIP_UNUSED = ("logit_scale", "attn_mask", "transformer.text_model.embeddings.position_ids")


def _third(index: int) -> Callable[[Tensor], Tensor]:
    """The rows of queries (0), keys (1) or values (2) of a joint projection."""
    return lambda joint: joint.chunk(3)[index]


def fit_names(state: Mapping[str, Tensor | Packed], wanted: Collection[str]) -> dict[str, Tensor | Packed]:
    """With or without 'text_model.' in front, as `wanted` has it: transformers 5.6 took it away from CLIPTextModel."""
    result: dict[str, Tensor | Packed] = {}
    for key, value in state.items():
        bare = key.removeprefix("text_model.")
        result[next((name for name in (key, bare, f"text_model.{bare}") if name in wanted), key)] = value
    return result


PIXART_NAMES = (
    (r"x_embedder\.proj", "pos_embed.proj"),
    (r"t_embedder\.mlp\.", "adaln_single.emb.timestep_embedder.linear_"),
    (r"csize_embedder\.mlp\.", "adaln_single.emb.resolution_embedder.linear_"),
    (r"ar_embedder\.mlp\.", "adaln_single.emb.aspect_ratio_embedder.linear_"),
    (r"y_embedder\.y_proj\.fc", "caption_projection.linear_"),
    (r"t_block\.1", "adaln_single.linear"),
    (r"final_layer\.linear", "proj_out"),
    (r"final_layer\.scale_shift_table", "scale_shift_table"),
    (r"blocks\.(\d+)\.scale_shift_table", r"transformer_blocks.\1.scale_shift_table"),
    (r"blocks\.(\d+)\.attn\.qkv", r"transformer_blocks.\1.attn1.to_q|to_k|to_v"),
    (r"blocks\.(\d+)\.attn\.proj", r"transformer_blocks.\1.attn1.to_out.0"),
    (r"blocks\.(\d+)\.cross_attn\.q_linear", r"transformer_blocks.\1.attn2.to_q"),
    (r"blocks\.(\d+)\.cross_attn\.kv_linear", r"transformer_blocks.\1.attn2.to_k|to_v"),
    (r"blocks\.(\d+)\.cross_attn\.proj", r"transformer_blocks.\1.attn2.to_out.0"),
    (r"blocks\.(\d+)\.mlp\.fc1", r"transformer_blocks.\1.ff.net.0.proj"),
    (r"blocks\.(\d+)\.mlp\.fc2", r"transformer_blocks.\1.ff.net.2"),
)
PIXART_KV = re.compile(r"blocks\.(\d+)\.attn\.((?:sr|norm)\.(?:weight|bias))")


def pixart_state(path: Path, prefix: str) -> tuple[dict[str, Tensor | Packed], dict[int, dict[str, Tensor]]]:
    """An original PixArt under diffusers' names, and the KV-compression tensors per block. ModelError for unknown keys."""
    state: dict[str, Tensor | Packed] = {}
    compression: dict[int, dict[str, Tensor]] = {}
    unknown = []
    for whole, value in stored_tensors(path, prefix).items():
        key = whole.removeprefix(prefix)
        match = PIXART_KV.fullmatch(key)
        if match:
            compression.setdefault(int(match[1]), {})[match[2]] = widened(value)
        elif key not in PIXART_TABLES:
            names = pixart_names(key)
            unknown += [] if names else [key]
            state |= {name: mapped(value, _chunk(len(names), index)) for index, name in enumerate(names)}
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} tensors are none of PixArt's, such as {unknown[0]}; not a model of this layout"
        )
    return state, compression


def _chunk(count: int, index: int) -> Callable[[Tensor], Tensor]:
    return lambda joint: joint.chunk(count)[index]


def pixart_names(key: str) -> list[str]:
    """The names in diffusers of an original PixArt tensor: one, several for joint projections, none for an unknown one."""
    for pattern, name in PIXART_NAMES:
        match = re.fullmatch(rf"{pattern}(.*)", key)
        if match is None:
            continue
        tail = match[match.lastindex or 1]
        stem = match.expand(name)
        if stem.endswith("linear_") and tail[:1] in "02" and "embedder" in stem:
            tail = f"{1 + int(tail[0]) // 2}{tail[1:]}"
        first, *others = stem.split("|")
        root = first.rpartition(".")[0]
        return [f"{first}{tail}", *(f"{root}.{other}{tail}" for other in others)]
    return []
