"""Changes that rotate a weight: OFT and BOFT of kohya, LyCORIS and peft.

Qiu et al. 2023 (OFT, arXiv 2306.07280); Liu et al. 2023 (BOFT, arXiv 2311.06243). Rotations are made in float64. The strength s
turns part of the way: I + s (R - I).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hires.models.adapters.change import Change


def oft(change: Change, weight: Tensor) -> Tensor:
    """Rows of W in k blocks of n: R^T W per block, R = (I + Q)(I - Q)^-1, Q = B - B^T (kohya, LyCORIS); BOFT for 4 axes.

    With alpha above 0, Q is scaled down so that its norm over all blocks is at most alpha times the output features. `rescale`
    multiplies rows after the rotation, 1 + s (rescale - 1). `oft_diag` holds R itself.
    """
    change.whole()
    stored = change.tensors.get("oft_diag")
    rotation = _cayley(_constrained(change, weight)) if stored is None else stored.double()
    if rotation.ndim not in (3, 4) or rotation.shape[-1] != rotation.shape[-2]:
        raise change.misfit(weight)
    rotation = _part_way(rotation, change.scale).to(weight.device, weight.dtype)
    turned = _butterfly(change, rotation, weight) if rotation.ndim == 4 else _turned(change, rotation.mT, weight)
    if "rescale" in change.tensors:
        rescale = change.tensor("rescale", weight).flatten()
        if rescale.numel() != weight.shape[0]:
            raise change.misfit(weight)
        turned = turned * (1 + change.scale * (rescale - 1)).view(-1, *[1] * (weight.ndim - 1))
    return turned - weight


def _constrained(change: Change, weight: Tensor) -> Tensor:
    """Q = B - B^T, (..., n, n), no longer than alpha times the output features; alpha 0 is no bound."""
    blocks = change.tensors["oft_blocks"].double()
    if blocks.ndim < 2 or blocks.shape[-1] != blocks.shape[-2]:
        raise change.misfit(weight)
    skew = blocks - blocks.mT
    bound, length = (change.number("alpha") or 0.0) * weight.shape[0], float(torch.linalg.vector_norm(skew))
    return skew * (bound / length) if 0 < bound < length else skew


def _cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 of each block, (..., n, n)."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotation: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return rotation


def _part_way(rotation: Tensor, scale: float) -> Tensor:
    """I + s (R - I)."""
    eye = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return eye + scale * (rotation - eye)


def _turned(change: Change, blocks: Tensor, weight: Tensor) -> Tensor:
    """Each run of n rows of W times its block, blocks (k, n, n)."""
    count, size, _ = blocks.shape
    if count * size != weight.shape[0]:
        raise change.misfit(weight)
    return torch.einsum("knm,km...->kn...", blocks, weight.reshape(count, size, *weight.shape[1:])).flatten(0, 1)


def _butterfly(change: Change, stages: Tensor, weight: Tensor) -> Tensor:
    """LyCORIS' BOFT, stages (m, k, b, b): stage j mixes rows that lie 2^j b/2 apart, R W per block."""
    half = stages.shape[-1] // 2
    for index, blocks in enumerate(stages):
        span = 2**index * half
        if not span or weight.shape[0] % (2 * span):
            raise change.misfit(weight)
        rest = weight.shape[1:]
        apart = weight.reshape(-1, 2, span, *rest).transpose(1, 2).flatten(0, 2)
        together = _turned(change, blocks, apart)
        weight = together.reshape(-1, span, 2, *rest).transpose(1, 2).flatten(0, 2)
    return weight


def peft_oft(change: Change, weight: Tensor) -> Tensor:
    """Columns of W (of a convolution: of its flattened rows) in k blocks of n: W diag(R)^T, Q from its upper triangle.

    R is the series I + 2Q + 2Q^2 + ... + Q^(t-1) of so many terms as the configuration states (5), or (I - Q)(I + Q)^-1. One
    block for all columns where the file holds one (block_share).
    """
    change.whole()
    triangle = change.tensors["oft_R"].double()
    size = (1 + math.isqrt(1 + 8 * triangle.shape[-1])) // 2
    columns = weight.flatten(1).shape[1]
    if triangle.ndim != 2 or size * (size - 1) // 2 != triangle.shape[1] or columns % size:
        raise change.misfit(weight)
    skew = torch.zeros(triangle.shape[0], size, size, dtype=triangle.dtype)
    rows, places = torch.triu_indices(size, size, 1)
    skew[:, rows, places] = triangle.cpu()
    skew = skew - skew.mT
    terms = change.stated.neumann_terms
    rotation = _part_way(_neumann(skew, terms) if terms else _cayley(-skew), change.scale)
    if len(rotation) == 1:
        rotation = rotation.expand(columns // size, -1, -1)
    turned = _turned(change, rotation.to(weight.device, weight.dtype), weight.flatten(1).T.contiguous())
    return turned.T.reshape(weight.shape) - weight


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q^2 + ... + 2Q^(t-2) + Q^(t-1), as peft cuts the series of (I + Q)(I - Q)^-1."""
    total = torch.eye(skew.shape[-1], dtype=skew.dtype).expand_as(skew).clone()
    if terms < 2:
        return total
    total += 2 * skew
    if terms < 3:
        return total
    power = skew @ skew
    total += 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        total += 2 * power
    return total + power @ skew


def peft_boft(change: Change, weight: Tensor) -> Tensor:
    """W diag(M)^T with M = M_m ... M_1, M_j = P_j diag(R_j) P_j^T, then rows times s; R_j = (I - Q)(I + Q)^-1.

    Q is the skew half of the stored block. peft lays a convolution's weight out as (i kh kw, o) without moving values; so does
    this.
    """
    change.whole()
    blocks = change.tensors["boft_R"].double()
    rows, columns = weight.shape[0], weight[0].numel()
    if blocks.ndim != 4 or blocks.shape[1] * blocks.shape[3] != columns or change.tensors["boft_s"].numel() != rows:
        raise change.misfit(weight)
    rotations = _part_way(_cayley((blocks.mT - blocks) / 2), change.scale).to(weight.device, weight.dtype)
    inputs = weight.flatten(1).T if weight.ndim == 2 else weight.reshape(columns, rows)
    turned = inputs
    for index, stage in enumerate(rotations):
        order = _butterfly_order(columns, stage.shape[-1], index) if len(rotations) > 1 else torch.arange(columns)
        stretched = torch.empty_like(turned)
        stretched[order] = turned
        turned = _turned(change, stage, stretched)[order]
    magnitudes = change.tensor("boft_s", weight).flatten()
    turned = turned * (1 + change.scale * (magnitudes - 1))
    return (turned.T if weight.ndim == 2 else turned).reshape(weight.shape) - weight


def _butterfly_order(columns: int, size: int, stage: int) -> Tensor:
    """Where peft's permutation of a stage takes columns from: within runs of 2^j b, even half blocks first, then odd ones."""
    return torch.arange(columns).reshape(-1, 2**stage, 2, size // 2).transpose(1, 2).flatten()
