"""Weights in 8-bit floats with scales: one number, one for each row, or one for each block of 128 x 128."""

from __future__ import annotations

from torch import Tensor

from hires.checkpoints.containers.packed import BLOCK


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """W = q s in float32.

    codes: (o, i) or (o, i, kh, kw) float8_e4m3fn or float8_e5m2. scale: one number, (o), (o, 1), or (o / 128, i / 128).
    """
    values, factor = codes.float(), scale.float()
    if factor.numel() == 1:
        return values * factor.reshape(())
    if factor.numel() == factor.shape[0] == values.shape[0]:
        return values * factor.reshape(-1, *[1] * (values.ndim - 1))
    rows, columns = values.shape
    blocks = factor.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values * blocks
