"""Muon (Jordan et al. 2024) for the weights of convolutions and linear layers; torch.optim.Muon takes 2-D tensors only."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of the original: singular values end near one after five rounds


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with singular values of about one (0.7 to 1.2), by five Newton-Schulz rounds in bfloat16."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


class Muon(Optimizer):
    """p -= lr * 0.2 sqrt(max(rows, cols)) * orthogonal(momentum), a step of the size of AdamW's (Liu et al. 2025).

    A convolution's weight (out, in, kh, kw) counts as the matrix (out, in * kh * kw).
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = self.state[p].setdefault("momentum", torch.zeros_like(p))
                kept.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(kept, group["momentum"]).flatten(1))
                size = 0.2 * math.sqrt(max(update.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * size)


def matrices(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters for Muon (weights of hidden layers) and the rest (embeddings, first and last layers, norms, biases)."""
    outer = ("embedding.weight", "conv_in", "conv_out")
    hidden = [p for name, p in module.named_parameters() if p.ndim >= 2 and not any(word in name for word in outer)]
    chosen = {id(p) for p in hidden}
    return hidden, [p for p in module.parameters() if id(p) not in chosen]
