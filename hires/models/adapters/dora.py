"""DoRA: a weight's direction changed by a product, its length by a vector of magnitudes.

Liu et al. 2024 (arXiv 2402.09353). V = W + f B A; the new weight is m V / ||V||, the norm taken over all axes but the one that
m is stored along. Norms are never those of half precision, so no epsilon is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hires.models.adapters.change import Change


def weight_decomposed(change: Change, weight: Tensor, delta: Tensor) -> Tensor:
    """What is added to W by a DoRA whose product is `delta` (f B A without s).

    LyCORIS' and kohya's `dora_scale`: s (m V / ||V|| - W). peft's `lora_magnitude_vector` has the strength inside, m per row:
    m V_s / ||V_s|| - W with V_s = W + s f B A.
    """
    if "magnitude" in change.tensors:
        magnitude = change.tensor("magnitude", weight).flatten()
        if magnitude.numel() != weight.shape[0]:
            raise change.misfit(weight)
        return _scaled(weight + change.scale * delta, magnitude, 0) - weight
    magnitude = change.tensor("dora_scale", weight)
    return change.scale * (_scaled(weight + delta, magnitude.flatten(), _axis(change, magnitude, weight)) - weight)


def _scaled(direction: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """M V / ||V||; a row or column of zeros stays."""
    others = [other for other in range(direction.ndim) if other != axis]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=others, keepdim=True)
    view = [1] * direction.ndim
    view[axis] = -1
    return direction / norm.clamp_min(torch.finfo(norm.dtype).tiny) * magnitude.view(view)


def _axis(change: Change, magnitude: Tensor, weight: Tensor) -> int:
    """The axis of W that magnitudes are along: [1, i, ...] the input's, [o, 1, ...] and a vector of length o the output's."""
    shape, rows, columns = magnitude.shape, weight.shape[0], weight.shape[1]
    if magnitude.numel() not in (rows, columns):
        raise change.misfit(weight)
    if len(shape) > 1 and shape[0] == 1 and magnitude.numel() == columns:
        return 1
    return 0 if magnitude.numel() == rows else 1
