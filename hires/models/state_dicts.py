"""Maps a single file's tensors to the names of diffusers and transformers.

They are mapped, not read.

The renaming of latent diffusion's UNet, VAE and OpenCLIP is that of diffusers; PixArt's is its authors' conversion table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hires._imports import quiet_imports
from hires.checkpoints.configs import PIXART_TABLES
from hires.checkpoints.headers import DAMAGED, read_header
from hires.errors import ModelError
from hires.units import Json


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names start with `prefix`, whole names, on the CPU and mapped.

    A .pth is checked by its header first, and opened by torch's own loader of weights only.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read ({error}); the file is damaged or cut short, download it again") from None
    read_header(path)
    try:
        document = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise ModelError(f"{path}: torch cannot load it ({reason}); damaged or cut short, download it again") from None
    return {name: value for name, value in _flat(document, "").items() if name.startswith(prefix)}


def _flat(value: object, name: str) -> dict[str, Tensor]:
    """Tensors of nested dicts by their dotted names."""
    if isinstance(value, Tensor):
        return {name: value}
    if not isinstance(value, Mapping):
        return {}
    state: dict[str, Tensor] = {}
    for key, inner in value.items():
        state |= _flat(inner, f"{name}.{key}" if name else str(key))
    return state


def unet_state(path: Path, prefix: str, config: Json) -> dict[str, Tensor]:
    """A UNet in latent diffusion's naming under diffusers' names."""
    with quiet_imports():
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    state = read_tensors(path, prefix)
    converted: dict[str, Tensor] = convert_ldm_unet_checkpoint(state, dict(config))
    return _all_of(state, converted, path)


def vae_state(path: Path, prefix: str, config: Json) -> dict[str, Tensor]:
    """An AutoencoderKL in latent diffusion's naming under diffusers' names; its attention's 1x1 convolutions become linear."""
    with quiet_imports():
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
    state = {key: value for key, value in read_tensors(path, prefix).items() if not key.startswith(f"{prefix}loss.")}
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(state, dict(config))
    return _all_of(state, converted, path)


def _all_of(state: Mapping[str, Tensor], converted: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The converted tensors; ModelError where the conversion left any out."""
    if len(converted) < len(state):
        shared = {value.data_ptr() for value in converted.values()}
        left = sorted(key for key, value in state.items() if value.data_ptr() not in shared)
        raise ModelError(f"{path}: {len(left)} tensors fit no known place, such as {left[:1]}; not a model of this layout")
    return converted


def clip_state(path: Path, prefix: str, wanted: Collection[str]) -> dict[str, Tensor]:
    """A CLIP text tower in transformers' naming of any version, under the names that are `wanted`."""
    state = {key.removeprefix(prefix): value for key, value in read_tensors(path, prefix).items()}
    return fit_names({key: value for key, value in state.items() if not key.endswith("position_ids")}, wanted)


def open_clip_state(path: Path, prefix: str, tower: Any) -> dict[str, Tensor]:
    """An OpenCLIP text tower under transformers' names: queries, keys and values apart, the projection transposed."""
    with quiet_imports():
        from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    converted: dict[str, Tensor] = convert_open_clip_checkpoint(tower, read_tensors(path, prefix), prefix=prefix)
    converted = {key: value for key, value in converted.items() if not key.endswith("position_ids")}
    return fit_names(converted, tower.state_dict().keys())


def fit_names(state: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
    """With or without 'text_model.' in front, as `wanted` has it: transformers 5.6 took it away from CLIPTextModel."""
    result = {}
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


def pixart_state(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """An original PixArt under diffusers' names, and the KV-compression tensors per block. ModelError for unknown keys."""
    state: dict[str, Tensor] = {}
    compression: dict[int, dict[str, Tensor]] = {}
    unknown = []
    for whole, value in read_tensors(path, prefix).items():
        key = whole.removeprefix(prefix)
        match = PIXART_KV.fullmatch(key)
        if match:
            compression.setdefault(int(match[1]), {})[match[2]] = value
        elif key not in PIXART_TABLES:
            names = pixart_names(key)
            unknown += [] if names else [key]
            state |= dict(zip(names, value.chunk(max(len(names), 1)), strict=False))
    if unknown:
        raise ModelError(
            f"{path}: {len(unknown)} tensors are none of PixArt's, such as {unknown[0]}; not a model of this layout"
        )
    return state, compression


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
