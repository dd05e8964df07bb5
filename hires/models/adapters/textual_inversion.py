"""Reads the rows of textual inversions, which take the place of token embeddings in a CLIP tower."""

from __future__ import annotations

import torch
from torch import Tensor

from hires.checkpoints.adapters.embeddings import row_keys
from hires.errors import ModelError
from hires.models.state_dicts import read_tensors
from hires.prompts.embeddings import EmbeddingFile


def read_rows(file: EmbeddingFile, tower: int, width: int) -> Tensor:
    """The rows of an embedding for a tower, (n, width) float32 on the CPU; n is `count_rows`."""
    tensors = read_tensors(file.path, file.bundle)
    keys = row_keys({key: tuple(tensor.shape) for key, tensor in tensors.items()}, tower, width)
    rows = torch.cat([tensors[key].reshape(-1, width).float() for key in keys])
    if not torch.isfinite(rows).all():
        raise ModelError(f"{file.path}: holds values that are not finite; train or download it again")
    return rows
