"""The call signatures that packages share: denoiser, network, condition, low-pass."""

from __future__ import annotations

from typing import Any, Protocol, Self

from torch import Tensor


class Condition(Protocol):
    """What a denoiser is conditioned on, for a batch of pictures: it follows the batch and the tiles of a canvas."""

    def crop(self, box: Any) -> Self:
        """The conditions of one tile; `box` is a `tiling.geometry.Box` in latent cells."""
        ...

    def pictures(self, start: int, stop: int) -> Self:
        """The conditions of pictures start to stop - 1 of the batch."""
        ...

    def concatenate(self, *others: Self) -> Self:
        """The conditions of one batch that holds these pictures and then the others'."""
        ...


class Denoiser(Protocol):
    """The posterior mean estimate of the clean latents."""

    def __call__(self, x: Tensor, sigma: float, cond: Any) -> Tensor:
        """The denoised estimate of x (B, C, h, w) at noise level sigma; `cond` is the denoiser's own kind of `Condition`."""
        ...


class Network(Protocol):
    """A raw network: from scaled latents, time and conditions to its output."""

    def __call__(self, x: Tensor, time: float, cond: Any) -> Tensor:
        """The output for x (B, C, h, w); `time` is in the network's own unit, a timestep or a function of sigma."""
        ...


class LowPass(Protocol):
    """A linear low-pass filter that leaves constants unchanged."""

    def __call__(self, x: Tensor) -> Tensor:
        """The low band of x, (B, C, h, w) float32, at the same size."""
        ...
