"""The signatures that the rooms share: denoiser, network, low-pass."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Denoiser(Protocol):
    """The posterior mean estimate of the clean latents."""

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor: ...


class Network(Protocol):
    """A raw network: scaled input (B, C, h, w), time (a float in the network's own unit) and conditions to its output."""

    def __call__(self, x: Tensor, time: float, cond: Any) -> Tensor: ...


class LowPass(Protocol):
    """A linear map of (B, C, h, w) float32 to its low band at the same size; constants pass unchanged."""

    def __call__(self, x: Tensor) -> Tensor: ...
