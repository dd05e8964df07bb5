"""A change that an adapter makes to one weight: its factors, how strongly they count, where the result goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hires.checkpoints.adapters.stated import LARGEST_ALPHA, Stated
from hires.errors import ModelError

NUMBERS = ("alpha", "scale", "scalar", "on_input")
"""Factors that are one number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The factors of a change to one parameter. In the formulas s is `scale`, W the weight, f the factor alpha / r."""

    where: str
    """The file and the layer, for messages."""
    kind: str
    """A name of `checkpoints.adapters.keys.KINDS`."""
    tensors: Mapping[str, Tensor]
    """The factors by their roles."""
    scale: float
    """How strongly it is merged: the LoRA's strength times the weight of the block."""
    name: str = ""
    """The layer's name below the prefix, for what is stated by name."""
    stated: Stated = field(default_factory=Stated)
    """What stands beside the tensors."""
    part: int = 0
    parts: int = 1
    """Of a joint projection (queries, keys, values in one): which of how many equal runs of rows the weight is."""
    widens: bool = False
    """Whether the weight may have more input channels than the change: the further ones are left as they are."""

    def tensor(self, role: str, like: Tensor) -> Tensor:
        """A factor in the weight's dtype, which is float32 or float64, on its device."""
        return self.tensors[role].to(like.device, like.dtype)

    def number(self, role: str) -> float | None:
        """A factor of one element; None where the file has none. ModelError for one that is no number of common size."""
        tensor = self.tensors.get(role)
        if tensor is None:
            return None
        value = float(tensor) if tensor.numel() == 1 else math.nan
        if not (math.isfinite(value) and abs(value) <= LARGEST_ALPHA):
            told = f"{value:g}" if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
            raise self.refusal(f"its {role} is {told}; the file is damaged, ask its author for a whole one")
        return value

    def factor(self, rank: int) -> float:
        """`scale` where the file has it, else alpha / r (alpha / sqrt(r) where rsLoRA is stated), else 1."""
        stored = self.number("scale")
        if stored is not None:
            return stored
        alpha = self.number("alpha")
        if alpha is None:
            alpha = self.stated.alpha_of(self.name)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.stated.rslora else rank)

    def placed(self, delta: Tensor, like: Tensor) -> Tensor:
        """A change in the shape of the weight: reshaped, its rows of a joint one, further input channels filled with zeros."""
        rows, per_row = like.shape[0] * self.parts, math.prod(like.shape[1:])
        if delta.ndim and delta.shape[0] == rows and delta.numel() == rows * per_row:
            return delta.reshape(rows, *like.shape[1:]).chunk(self.parts)[self.part]
        area = math.prod(like.shape[2:])
        if self.widens and like.ndim == 4 and delta.shape[0] == rows and delta.numel() % (rows * area) == 0:
            narrow = delta.reshape(rows, -1, *like.shape[2:])
            if narrow.shape[1] < like.shape[1]:
                return torch.cat([narrow, narrow.new_zeros(rows, like.shape[1] - narrow.shape[1], *like.shape[2:])], dim=1)
        raise self.misfit(like)

    def whole(self) -> None:
        """ModelError where the weight is a part of a joint projection: this kind needs the whole of it."""
        if self.parts > 1:
            raise self.refusal(
                "changes a joint projection of queries, keys and values in a way that needs it whole; not supported"
            )

    def misfit(self, like: Tensor) -> ModelError:
        """The factors do not fit the weight."""
        shapes = ", ".join(
            f"{role} {tuple(tensor.shape)}" for role, tensor in sorted(self.tensors.items()) if role not in NUMBERS
        )
        return self.refusal(f"{shapes} do not fit a weight of {tuple(like.shape)}; it is for another model, or damaged")

    def refusal(self, reason: str) -> ModelError:
        """A ModelError that names the file and the layer."""
        return ModelError(f"{self.where}: {reason}")
