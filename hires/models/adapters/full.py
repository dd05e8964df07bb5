"""Changes that are stored whole: differences of weights, biases and norms, and replaced weights."""

from __future__ import annotations

from torch import Tensor

from hires.models.adapters.change import Change


def difference(change: Change, weight: Tensor) -> Tensor:
    """S times the stored difference of a weight, a bias or a norm."""
    (role,) = change.tensors
    return change.scale * change.placed(change.tensor(role, weight), weight)


def replacement(change: Change, weight: Tensor) -> Tensor:
    """What turns W into the stored value, whatever the strength."""
    return change.placed(change.tensor("set_weight", weight), weight) - weight
