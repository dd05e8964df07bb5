"""Changes that are products of small factors: LoRA, LoCon, LoHa, LoKr, GLoRA, (IA)³.

Hu et al. 2021 (arXiv 2106.09685); Yeh et al. 2023 (LyCORIS, arXiv 2309.14859); Hyeon-Woo et al. 2021 (LoHa, arXiv
2108.06098); Edalati et al. 2022 (LoKr, arXiv 2212.10650); Chavan et al. 2023 (GLoRA, arXiv 2306.07967); Liu et al. 2022
((IA)³, arXiv 2205.05638). All are linear in the strength s; LoRA, LoHa and LoKr may be the direction of a DoRA.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hires.models.adapters.change import Change
from hires.models.adapters.dora import weight_decomposed


def lora(change: Change, weight: Tensor) -> Tensor:
    """S f U D; with a middle M (r, r, kh, kw), as LoCon in Tucker form has it, s f sum_mn M_mn U_om D_ni."""
    up, down = change.tensor("up", weight).flatten(1), change.tensor("down", weight)
    rank = down.shape[0]
    if "mid" in change.tensors:
        delta = torch.einsum("mn...,om,ni->oi...", change.tensor("mid", weight), up, down.flatten(1))
    else:
        delta = up @ down.flatten(1)
    return _finished(change, weight, delta, change.factor(rank))


def loha(change: Change, weight: Tensor) -> Tensor:
    """S f (A1 B1 * A2 B2); in Tucker form each factor is P_or = sum_ij t_ij a_io b_jr."""
    one, two = (_hadamard_factor(change, weight, i) for i in (1, 2))
    if one.shape != two.shape:
        raise change.misfit(weight)
    return _finished(change, weight, one * two, change.factor(change.tensors["hada_w1_b"].shape[0]))


def _hadamard_factor(change: Change, weight: Tensor, index: int) -> Tensor:
    a, b = (change.tensor(f"hada_w{index}_{leaf}", weight) for leaf in "ab")
    if f"hada_t{index}" in change.tensors:
        return _tucker(change.tensor(f"hada_t{index}", weight), a, b)
    return a @ b.flatten(1)


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """P_or.. = sum_ij t_ij.. a_io b_jr, of t (r, r, kh, kw), a (r, o), b (r, i)."""
    return torch.einsum("ij...,io,jr->or...", core, a, b)


def lokr(change: Change, weight: Tensor) -> Tensor:
    """S f (w1 ⊗ w2). Where both factors are stored whole f is 1 and alpha is not looked at; else r is the split one's."""
    tensors = change.tensors
    one = change.tensor("lokr_w1", weight) if "lokr_w1" in tensors else _split(change, weight, 1)
    two = change.tensor("lokr_w2", weight) if "lokr_w2" in tensors else _split(change, weight, 2)
    delta = torch.kron(one.flatten(1), two.flatten(1))
    return _finished(change, weight, delta, _lokr_factor(change))


def _split(change: Change, weight: Tensor, index: int) -> Tensor:
    a, b = (change.tensor(f"lokr_w{index}_{leaf}", weight) for leaf in "ab")
    if index == 2 and "lokr_t2" in change.tensors:
        return _tucker(change.tensor("lokr_t2", weight), a, b)
    return a @ b.flatten(1)


def _lokr_factor(change: Change) -> float:
    """Alpha / r, once. peft states its rank and takes it where both factors are whole too."""
    for role in ("lokr_w2_b", "lokr_w1_b"):
        if role in change.tensors:
            return change.factor(change.tensors[role].shape[0])
    alpha = change.stated.alpha_of(change.name)
    if change.stated.peft and change.stated.rank and alpha is not None:
        return alpha / change.stated.rank
    return 1.0


def glora(change: Change, weight: Tensor) -> Tensor:
    """S f (W A1 A2 + B1 B2), A1 (i, r), A2 (r, i), B1 (o, r), B2 (r, i); older files hold s f (W A2 A1 + B2 B1).

    They are told apart by which axes are r; where both fit it is the newer form. On a convolution the newer form takes A along
    the input channels, the older one along all of a row.
    """
    change.whole()
    a1, a2, b1, b2 = (change.tensor(role, weight).flatten(1) for role in ("a1", "a2", "b1", "b2"))
    if a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]:
        rank = a2.shape[0]
        moved = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        product = b1 @ b2
    elif a2.shape[1] == a1.shape[0] == b2.shape[1] == b1.shape[0]:
        rank = a1.shape[0]
        moved = (weight.flatten(1) @ a2 @ a1).reshape(weight.shape)
        product = b2 @ b1
    else:
        raise change.misfit(weight)
    scalar = change.number("scalar")
    factor = change.factor(rank) * (1.0 if scalar is None else scalar)
    return change.scale * factor * (moved + change.placed(product, weight))


def ia3(change: Change, weight: Tensor) -> Tensor:
    """S W * w: w scales the rows, or with `on_input` the columns."""
    change.whole()
    vector, on_input = change.tensor("weight", weight).flatten(), bool(change.number("on_input"))
    axis = 1 if on_input else 0
    if weight.ndim < 2 or vector.numel() != weight.shape[axis]:
        raise change.misfit(weight)
    view = [1] * weight.ndim
    view[axis] = -1
    return change.scale * weight * vector.view(view)


def _finished(change: Change, weight: Tensor, delta: Tensor, factor: float) -> Tensor:
    """A product times `scalar`, plus the sparse rest of an extraction, times f; then times s, or as a DoRA's direction."""
    scalar = change.number("scalar")
    if scalar is not None:
        delta = delta * scalar
    if "bias_values" in change.tensors:
        delta = delta + _sparse(change, weight, delta)
    delta = change.placed(factor * delta, weight)
    if {"dora_scale", "magnitude"} & change.tensors.keys():
        change.whole()
        return weight_decomposed(change, weight, delta)
    return change.scale * delta


def _sparse(change: Change, weight: Tensor, delta: Tensor) -> Tensor:
    """The entries that an extraction stored beside the product, (o, i) or (o, i, kh, kw), in the shape of `delta`."""
    indices, values = change.tensors["bias_indices"].to(torch.int64), change.tensor("bias_values", weight)
    size = tuple(int(side) for side in change.tensors["bias_size"].flatten())
    fits = math.prod(size) == delta.numel() and indices.shape == (len(size), values.numel())
    if not fits or any(int(row.min()) < 0 or int(row.max()) >= side for row, side in zip(indices, size, strict=True)):
        raise change.misfit(weight)
    whole = torch.zeros(size, dtype=delta.dtype, device=delta.device)
    return whole.index_put(tuple(indices.to(delta.device)), values.flatten(), accumulate=True).reshape(delta.shape)
