"""PixArt-δ's ControlNet (arXiv 2401.05252): edges steer the first blocks.

Block 0 of the base runs alone. Beside block i = 1..n runs copy i - 1: the first begins with x + before_proj(c), the others
go on with c; each hands after_proj(c) to its block, which gets x + that. A projection of zeros leaves the base as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hires.checkpoints.model import ModelSpec
from hires.errors import ModelError
from hires.models.loading import Home, take_weights
from hires.models.state_dicts import pixart_names, read_tensors
from hires.models.storage.layers import unpacked_copy


class ControlBlock(nn.Module):
    """A copy of a block with its projections; the first copy has `before_proj`."""

    def __init__(self, block: nn.Module, width: int, first: bool) -> None:
        super().__init__()
        self.before_proj = nn.Linear(width, width) if first else None
        self.copied_block = block
        self.after_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor, call: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """X (B, N, D) of the base and c (B, N, D) of the copy before; the new c, and what is added to x."""
        c = c if self.before_proj is None else x + self.before_proj(c)
        c = self.copied_block(c, **call)
        return c, self.after_proj(c)


@dataclass
class Carrier:
    """What goes from copy to copy within one forward; `PixArtNetwork` lays the embedded edges in before each."""

    c: Tensor | None = None


class ControlledBlock(nn.Module):
    """A block of the transformer with the copy that steers it."""

    def __init__(self, block: nn.Module, control: ControlBlock, carrier: Carrier) -> None:
        super().__init__()
        self.block, self.control, self.carrier = block, control, carrier

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """The block's output (B, N, C) with the copy's added; the arguments are those of diffusers' block."""
        call = {
            "attention_mask": attention_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "timestep": timestep,
            "cross_attention_kwargs": cross_attention_kwargs,
            "class_labels": class_labels,
        }
        assert self.carrier.c is not None, "the edges were laid in"
        self.carrier.c, skip = self.control(hidden_states, self.carrier.c, call)
        steered: Tensor = self.block(hidden_states + skip, **call)
        return steered


def attach(transformer: Any, blocks: Sequence[ControlBlock]) -> Carrier:
    """Let the copies steer blocks 1, 2, ... of a diffusers PixArtTransformer2DModel."""
    carrier = Carrier()
    for index, block in enumerate(blocks, start=1):
        transformer.transformer_blocks[index] = ControlledBlock(transformer.transformer_blocks[index], block, carrier)
    return carrier


def detach(transformer: Any) -> None:
    """Take copies that steer a transformer away again; nothing happens where there are none."""
    for index, block in enumerate(transformer.transformer_blocks):
        if isinstance(block, ControlledBlock):
            transformer.transformer_blocks[index] = block.block


def load_control(spec: ModelSpec, transformer: Any, home: Home) -> tuple[ControlBlock, ...]:
    """The copies that a checkpoint holds beside its base model, in order; none for other checkpoints."""
    part = spec.parts["network"]
    if part.layout != "pixart" or part.path is None or not part.prefix.endswith("base_model."):
        return ()
    prefix = part.prefix.removesuffix("base_model.") + "controlnet."
    state = read_tensors(part.path, prefix)
    per_block: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        index, _, key = name.removeprefix(prefix).partition(".")
        for target, piece in _renamed(part.path, key, value).items():
            per_block.setdefault(int(index), {})[target] = piece
    return tuple(
        _built(transformer.transformer_blocks[index], per_block[index], part.path, home) for index in sorted(per_block)
    )


def _renamed(path: Path, key: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of a copy under diffusers' names; joint projections are split."""
    if re.fullmatch(r"(before|after)_proj\.(weight|bias)", key):
        return {key: value}
    names = pixart_names(f"blocks.0.{key.removeprefix('copied_block.')}")
    if not key.startswith("copied_block.") or not names:
        raise ModelError(f"{path}: controlnet key {key} is none of PixArt's ControlNet; download it again")
    local = [name.replace("transformer_blocks.0.", "copied_block.", 1) for name in names]
    return dict(zip(local, value.chunk(len(local)), strict=True))


def _built(like: nn.Module, state: dict[str, Tensor], path: Path, home: Home) -> ControlBlock:
    width = state["after_proj.weight"].shape[0]
    block = ControlBlock(unpacked_copy(like), width, "before_proj.weight" in state)
    loaded = take_weights(block.to("meta"), {**state}, path, home)
    assert isinstance(loaded, ControlBlock)
    return loaded
