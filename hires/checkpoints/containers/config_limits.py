"""Checks what a model's JSON says before anything is counted or built by it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from hires.units import Json

LARGEST_FILE = 2**24
"""Bytes of a config; published ones have some kB."""
LARGEST_NUMBER = 2**31
MOST_LAYERS = 200
LAYERS = frozenset(
    {"layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"}
    | {"num_layers", "num_hidden_layers", "num_decoder_layers", "num_encoder_blocks", "num_decoder_blocks"}
)
"""What says how many modules there are; whole numbers from 0 to `MOST_LAYERS`, or lists of them."""
AT_LEAST_ONE = frozenset({"num_layers", "num_hidden_layers"})
LARGEST_SIDE = 2**17
SIDES = frozenset(
    {"sample_size", "patch_size", "in_channels", "out_channels", "latent_channels", "block_out_channels", "norm_num_groups"}
    | {"cross_attention_dim", "caption_channels", "hidden_size", "intermediate_size", "projection_dim", "vocab_size"}
    | {"num_attention_heads", "attention_head_dim", "time_embedding_dim", "d_model", "d_kv", "d_ff", "num_heads"}
    | {"max_position_embeddings", "relative_attention_num_buckets", "conv_in_kernel", "conv_out_kernel"}
    | {"projection_class_embeddings_input_dim", "addition_time_embed_dim", "num_train_timesteps"}
)
"""What says how large something is; whole numbers from 1 to `LARGEST_SIDE`, or lists of them."""


def read_config(path: Path) -> Json:
    """The object of a JSON file. ValueError for one that is none, or that says what no model can have; OSError as `open`."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than any config")
    try:
        document = json.loads(path.read_text(), parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("lists or objects too deep in one another") from None
    if not isinstance(document, dict):
        raise ValueError("no object of names and values")
    check_config(document)
    return document


def check_config(config: Mapping[str, object]) -> None:
    """ValueError for a number beyond all sense or kinds of blocks that are no list of words, with its name."""
    for key, value in config.items():
        if key.endswith("block_types") and not (isinstance(value, list) and all(isinstance(kind, str) for kind in value)):
            raise ValueError(f"{key} {str(value)[:60]!r}, no list of kinds of blocks")
    buckets, distance = config.get("relative_attention_num_buckets"), config.get("relative_attention_max_distance")
    if isinstance(buckets, int) and isinstance(distance, int) and distance <= buckets // 4:
        raise ValueError(f"relative_attention_max_distance {distance}, within the first half of {buckets} buckets")
    for key, value in _entries(config):
        if key in LAYERS or key in SIDES:
            least, most = (int(key in AT_LEAST_ONE), MOST_LAYERS) if key in LAYERS else (1, LARGEST_SIDE)
            if value is not None and not (type(value) is int and least <= value <= most):
                raise ValueError(f"{key} {_short(value)}, no whole number from {least} to {most:,}")
        elif isinstance(value, float | int) and not abs(value) <= LARGEST_NUMBER:
            raise ValueError(f"{key} {_short(value)}, beyond {LARGEST_NUMBER:,}")


def check_layers(config: Mapping[str, object], tensors: int) -> None:
    """ValueError for more layers than there are tensors: a module of them would take hours to build."""
    layers = [value for key, value in _entries(config) if key in LAYERS and isinstance(value, int)]
    if max(layers, default=0) > tensors:
        raise ValueError(f"{max(layers)} layers, and the weights are {tensors} tensors")


def _entries(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """The values of an object and of those in it, lists taken apart, each with its name."""
    left: list[tuple[str, object]] = list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items() if key not in LAYERS | SIDES else [(key, str(value))]
        elif isinstance(value, list):
            left += [(key, inner) for inner in value] or [(key, None)]
        else:
            yield key, value


def _no_constant(word: str) -> float:
    raise ValueError(f"{word}, which is no number")


def _short(value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "infinity"
    return f"{value:g}" if isinstance(value, float | int) and abs(value) > LARGEST_NUMBER else repr(value)[:60]
