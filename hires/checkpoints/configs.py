"""Builds the configs of a single file's components from its tensors' shapes.

Imports no torch.

A shipped config says what shapes cannot (activations, embeddings of time); everything that they can is read from them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from hires.errors import ModelError
from hires.units import Json

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
LDM_NETWORK = "model.diffusion_model."
LDM_VAE = "first_stage_model."
LDM_CLIP_L = ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer.")
LDM_CLIP_G = "conditioner.embedders.1.model."
HEAD_DIM = 64
PIXART_TABLES = ("pos_embed", "y_embedder.y_embedding")  # in its .pth, no weights of the network
Shapes = Mapping[str, tuple[int, ...]]


def shipped_config(folder: str, component: str) -> Path:
    """The JSON file with the config of a component that its own file lacks."""
    return CONFIGS / folder / component / "config.json"


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


DIGITS = 3
"""Of the largest number that a layer of any known network has in its name."""


def count(names: Iterable[str], pattern: str) -> int:
    """How many parts the pattern's one group numbers: 1 + the largest number, 0 without a match.

    ModelError for a number that no network has, up to which nothing could be counted.
    """
    numbers = [match[1] for name in names if (match := re.match(pattern, name))]
    odd = next((number for number in numbers if len(number) > DIGITS), None)
    if odd is not None:
        raise ModelError(f"a tensor of layer number {odd[:20]}, which no network has; damaged, download the model again")
    return max(map(int, numbers), default=-1) + 1


def ldm_unet_config(shapes: Shapes, base: Path) -> Json:
    """The diffusers config of a UNet in the naming of latent diffusion: SDXL, CosXL, SD1.5, SSD-1B, Vega, KOALA.

    ModelError for a level that attends after some of its resnets only.
    """
    config: Json = json.loads(base.read_text())
    inputs = count(shapes, r"input_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    firsts = [1, *(i + 1 for i in downs)]
    resnets = (downs[0] if downs else inputs) - 1
    depths = [[_depth(shapes, f"input_blocks.{i + n}.1") for n in range(resnets)] for i in firsts]
    rising = [
        [_depth(shapes, f"output_blocks.{level * (resnets + 1) + n}.1") for n in range(resnets + 1)]
        for level in range(len(firsts))
    ]
    contexts = [shape[1] for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")]
    channels = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts]
    config |= {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": resnets,
        "cross_attention_dim": contexts[0],
        "down_block_types": ["CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in rising],
        "use_linear_projection": all(len(s) == 2 for name, s in shapes.items() if name.endswith(".1.proj_in.weight")),
    }
    config |= _transformer_layers(shapes, depths, rising)
    if isinstance(config["attention_head_dim"], list):  # a number of heads, for all that it is called
        config["attention_head_dim"] = [max(1, width // HEAD_DIM) for width in channels]
    if "time_embed.cond_proj.weight" in shapes:
        config["time_cond_proj_dim"] = shapes["time_embed.cond_proj.weight"][1]
    if "label_emb.0.0.weight" in shapes:
        pooled = shapes["label_emb.0.0.weight"][1]
        config["projection_class_embeddings_input_dim"] = pooled
    return config


def _depth(shapes: Shapes, block: str) -> int:
    """Transformer blocks of one attention block."""
    return count(shapes, re.escape(block) + r"\.transformer_blocks\.(\d+)\.")


def _transformer_layers(shapes: Shapes, depths: Sequence[Sequence[int]], rising: Sequence[Sequence[int]]) -> Json:
    """How diffusers' config says the depth of each block, and of which kind the mid block is.

    depths: of the blocks of each level on the way down; rising: on the way up, the deepest level first.
    """
    for level in (*depths, *rising):
        if any(level) and not all(level):
            raise ModelError(f"a UNet with transformers of depths {list(level)} in one level is not supported")
    middle = _depth(shapes, "middle_block.1")
    kind = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D" if "middle_block.0.in_layers.0.weight" in shapes else None
    own = {} if kind == "UNetMidBlock2DCrossAttn" else {"mid_block_type": kind}
    even = all(len(set(level)) <= 1 for level in (*depths, *rising))
    if even and [level[0] for level in depths] == [level[0] for level in reversed(rising)]:
        levels = [max(level[0], 1) for level in depths]
        if kind == "UNetMidBlock2DCrossAttn" and any(depths[-1]) and middle != levels[-1]:
            raise ModelError(f"a UNet with a mid block of {middle} transformers over {levels[-1]} is not supported")
        return own | {"transformer_layers_per_block": [*levels[:-1], middle or levels[-1]]}
    if middle and any(deep != middle for deep in depths[-1]):
        raise ModelError(f"a UNet with a mid block of {middle} transformers over {list(depths[-1])} is not supported")
    return own | {
        "transformer_layers_per_block": [[max(deep, 1) for deep in level] for level in depths],
        "reverse_transformer_layers_per_block": [[max(deep, 1) for deep in level] for level in rising],
    }


def as_ldm_names(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors of a diffusers UNet under latent diffusion's names."""
    resnets = count(shapes, r"down_blocks\.0\.resnets\.(\d+)\.")
    names = ldm_unet_names({name.rpartition(".")[0] for name in shapes}, resnets)
    return {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": shape for name, shape in shapes.items()}


def diffusers_vae_config(shapes: Shapes, base: Path) -> Json:
    """The diffusers config of an AutoencoderKL from one file in diffusers' naming."""
    config: Json = json.loads(base.read_text())
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    return config | {
        "block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def ldm_vae_config(shapes: Shapes, base: Path) -> Json:
    """The diffusers config of an AutoencoderKL in the naming of latent diffusion."""
    config: Json = json.loads(base.read_text())
    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    config |= {
        "block_out_channels": [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return config


def clip_config(shapes: Shapes, base: Path) -> Json:
    """The transformers config of a CLIP text tower, in the naming of transformers (of any version) or of OpenCLIP."""
    config: Json = json.loads(base.read_text())
    openclip = "positional_embedding" in shapes
    shapes = shapes if openclip else {f"text_model.{name.removeprefix('text_model.')}": s for name, s in shapes.items()}
    position = "positional_embedding" if openclip else "text_model.embeddings.position_embedding.weight"
    tokens = "token_embedding.weight" if openclip else "text_model.embeddings.token_embedding.weight"
    layer = "transformer.resblocks." if openclip else "text_model.encoder.layers."
    first = "mlp.c_fc.weight" if openclip else "mlp.fc1.weight"
    width = shapes[tokens][1]
    config |= {
        "hidden_size": width,
        "vocab_size": shapes[tokens][0],
        "max_position_embeddings": shapes[position][0],
        "num_hidden_layers": count(shapes, re.escape(layer) + r"(\d+)\."),
        "intermediate_size": shapes[f"{layer}0.{first}"][0],
        "num_attention_heads": max(1, width // HEAD_DIM),
    }
    if openclip:
        config["projection_dim"] = shapes["text_projection"][1]
    return config


def pixart_config(shapes: Shapes, base: Path, position_span: float) -> Json:
    """The diffusers config of a PixArt transformer in the naming of its original .pth.

    `position_span` is over how many units its position embedding runs per axis (32; 16 for α-256).
    """
    config: Json = json.loads(base.read_text())
    width, latent_channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = max(1, width // config["attention_head_dim"])
    config |= {
        "num_layers": count(shapes, r"blocks\.(\d+)\."),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "in_channels": latent_channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "patch_size": patch,
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in shapes,
    }
    if "pos_embed" in shapes:
        grid = math.isqrt(shapes["pos_embed"][-2])
        config |= {"sample_size": grid * patch, "interpolation_scale": grid / position_span}
    return config


def kv_compression(shapes: Shapes) -> tuple[int, ...]:
    """The factor per axis by which each PixArt block thins keys and values, 1 where it does not; () where none does."""
    factors = [shapes.get(f"blocks.{i}.attn.sr.weight", (1,))[-1] for i in range(count(shapes, r"blocks\.(\d+)\."))]
    return tuple(factors) if max(factors, default=1) > 1 else ()


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_unet_names(modules: Collection[str], resnets: int) -> dict[str, str]:
    """The latent-diffusion name of each module of a diffusers UNet with `resnets` per level.

    Such as 'down_blocks.1.attentions.0.proj_in' to 'input_blocks.4.1.proj_in'.
    """
    attends = {int(match[1]) for name in modules if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return {name: _ldm_unet_name(name, resnets, attends) for name in modules}


def _ldm_unet_name(name: str, resnets: int, attends: Collection[int]) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.?(.*)|mid_block\.(\w+)\.(\d+)\.?(.*)", name)
    if match is None:
        return name
    side, block, kind, index, rest, mid_kind, mid_index, mid_rest = match.groups()
    if side is None:
        part = 1 if mid_kind == "attentions" else 2 * int(mid_index)
        return f"middle_block.{part}.{_inner(mid_kind, mid_rest)}"
    first = int(block) * (resnets + 1) + (1 if side == "down" else 0)
    if kind == "downsamplers":
        return f"input_blocks.{first + resnets}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + resnets}.{2 if int(block) in attends else 1}.conv"
    stem = "input_blocks" if side == "down" else "output_blocks"
    return f"{stem}.{first + int(index)}.{1 if kind == 'attentions' else 0}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
