"""What the text towers hold while they encode, from their published shapes. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerShape:
    """A text tower: layers, width, width of its feed-forward, heads, and how many maps of that width its activation holds."""

    layers: int
    width: int
    forward: int
    heads: int
    forward_maps: int


CLIP = {
    "clip_l": TowerShape(layers=12, width=768, forward=3072, heads=12, forward_maps=3),  # x * sigmoid(1.702 x): two results
    "clip_g": TowerShape(layers=32, width=1280, forward=5120, heads=20, forward_maps=2),
}
T5_XXL = TowerShape(layers=24, width=4096, forward=10240, heads=64, forward_maps=4)  # gated, by a tanh written out
T5_MAPS = (6, 4)  # of the width: in attention (input, norm, queries, keys, values, result), in the feed-forward


def text_elements(tower: str, prompts: int, tokens: int) -> int:
    """The most elements alive at once while `prompts` prompts of `tokens` tokens go through a tower, ids and mask included."""
    rows = prompts * tokens
    if tower == "t5":
        shape, bias = T5_XXL, T5_XXL.heads * tokens**2
        attention = 2 * prompts * bias + bias + T5_MAPS[0] * rows * shape.width  # scores and their softmax, and the bias
        forward = bias + rows * (shape.forward_maps * shape.forward + T5_MAPS[1] * shape.width)
        return max(attention, forward) + rows * tokens + 8 * rows
    shape = CLIP[tower]
    kept = shape.layers + 2  # every layer's states are handed back
    return rows * (kept * shape.width + shape.forward_maps * shape.forward) + 8 * rows


def text_live_bytes(towers: tuple[str, ...], prompts: int, tokens: int, element: int) -> int:
    """The peak over the towers, which run one after the other; weights not included."""
    return max(text_elements(tower, prompts, tokens) for tower in towers) * element
