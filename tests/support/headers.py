"""Weights files that hold a header and no values: names, dtypes and shapes as real files have them, sparse on the disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from hires._imports import quiet_imports
from hires.checkpoints.containers.tensors import DTYPE_BYTES
from tests.support.checkpoints import WIDTH, shipped
from tests.support.original_names import unet_to_ldm, vae_to_ldm

with quiet_imports():
    from diffusers import AutoencoderKL, UNet2DConditionModel

Shapes = dict[str, tuple[int, ...]]
Entries = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of each tensor."""
LAYOUTS: dict[str, dict[str, object]] = {
    "SSD-1B": {
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "Segmind-Vega": {
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "KOALA-700M": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None},
    "KOALA-1B": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6]},
}
"""What the published configs of thinner SDXL UNets say beside SDXL's own."""
NARROW = {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 1, 1],
    "cross_attention_dim": 2 * WIDTH,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 256,
    "sample_size": 32,
}
"""SDXL's UNet, thin enough for a test."""


def narrow_unet(**changes: object) -> torch.nn.Module:
    """A narrow SDXL UNet on no memory."""
    config = shipped("sdxl/unet") | NARROW | {"transformer_layers_per_block": [1, 1, 2]} | changes
    with torch.device("meta"), quiet_imports():
        module: torch.nn.Module = UNet2DConditionModel.from_config(config)
    return module


def narrow_vae(**changes: object) -> torch.nn.Module:
    """A narrow AutoencoderKL of four levels on no memory."""
    config = shipped("sdxl/vae") | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1} | changes
    with torch.device("meta"), quiet_imports():
        module: torch.nn.Module = AutoencoderKL.from_config(config)
    return module


def vae_shapes(vae: torch.nn.Module) -> Shapes:
    """An autoencoder's tensors in latent diffusion's naming."""
    return {name: tuple(value.shape) for name, value in vae_to_ldm(vae).items()}


def own_shapes(module: torch.nn.Module) -> Shapes:
    """A module's tensors under its own names."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def ldm_shapes(network: torch.nn.Module) -> Shapes:
    """A UNet's tensors in latent diffusion's naming."""
    return {name: tuple(value.shape) for name, value in unet_to_ldm(network).items()}


def as_entries(
    shapes: Mapping[str, tuple[int, ...]], dtype: str = "F16", prefix: str = ""
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same names under a prefix, all of one dtype."""
    return {prefix + name: (dtype, shape) for name, shape in shapes.items()}


def write_safetensors(
    path: Path, entries: Entries, metadata: Mapping[str, str] | None = None, values: Mapping[str, bytes] | None = None
) -> Path:
    """A .safetensors of these tensors; `values` are the bytes of some, all others are zeros that take no room."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, places = 0, {}
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * DTYPE_BYTES.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name], at = at, at + size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + at)
        for name, raw in (values or {}).items():
            stream.seek(8 + len(text) + places[name])
            stream.write(raw)
    return path


def write_torch(
    path: Path, shapes: Mapping[str, tuple[int, ...]], around: Mapping[str, object] | None = None, old: bool = False
) -> Path:
    """A file of torch.save with these tensors under 'state_dict' and other things beside it; every value is the same one."""
    one = torch.zeros(1, dtype=torch.float16)
    state = {name: (one.expand(shape) if shape else one[0]) for name, shape in shapes.items()}
    torch.save({"state_dict": state, **(around or {})}, path, _use_new_zipfile_serialization=not old)
    return path


GGML_TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144)}


def write_gguf(
    path: Path, entries: Entries, facts: Mapping[str, str | list[int]], values: Mapping[str, bytes] | None = None
) -> Path:
    """A .gguf; dtypes are ggml's names, facts its metadata: texts and lists of whole numbers."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word.encode())) + word.encode()

    head = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(facts))
    for name, fact in facts.items():
        if isinstance(fact, str):
            head += text(name) + struct.pack("<I", 8) + text(fact)
        else:
            head += text(name) + struct.pack("<IIQ", 9, 5, len(fact)) + struct.pack(f"<{len(fact)}i", *fact)
    at, places = 0, {}
    for name, (dtype, shape) in entries.items():
        kind, block, size = GGML_TYPES[dtype]
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, at)
        places[name] = at
        at += -(-math.prod(shape) // block * size // 32) * 32
    start = -(-len(head) // 32) * 32
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(start + at)
        for name, raw in (values or {}).items():
            stream.seek(start + places[name])
            stream.write(raw)
    return path
