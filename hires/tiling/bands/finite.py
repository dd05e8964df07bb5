"""Checks that an autoencoder's output is finite: NaN is an error, never a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from hires.errors import NotFiniteError

LOWER = (torch.float16, torch.bfloat16)  # dtypes whose overflowing results are computed again in float32


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity. Synchronises with the device."""
    return bool(torch.isfinite(x).all())


def check_finite(x: Tensor, where: str) -> Tensor:
    """Return x, a float32 result, unchanged. NotFiniteError naming `where` if it holds NaN or infinity."""
    if all_finite(x):
        return x
    raise NotFiniteError(
        f"the autoencoder gives NaN or infinity in {where}, in float32 too: its weights are damaged, or its input is out of "
        "range; download it again, or leave `tiny_vae`, `loras`, `guidance` or `sigma_max` out"
    )


def lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 result in a lower precision, or unchanged if it overflows there."""
    lower = x.to(dtype)
    return lower if all_finite(lower) else x
