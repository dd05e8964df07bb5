"""What an autoencoder gives must be numbers: black rows of NaN are an error, never a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from hires.errors import NotFiniteError

LOWER = (torch.float16, torch.bfloat16)  # precisions below float32, in which a result is computed again


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity. Waits for the device."""
    return bool(torch.isfinite(x).all())


def check_finite(x: Tensor, where: str) -> Tensor:
    """x itself. NotFiniteError, which names `where`, for NaN or infinity that float32 gives too."""
    if all_finite(x):
        return x
    raise NotFiniteError(
        f"the autoencoder gives NaN or infinity in {where}, in float32 too: its weights are damaged, or its input is out of "
        "its range; download it again, or leave --tiny-vae, --lora, --guidance or --sigma-max out"
    )


def lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 result in a lower precision where that can hold it, else as it is."""
    lower = x.to(dtype)
    return lower if all_finite(lower) else x
