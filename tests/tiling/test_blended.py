from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hires.tiling.geometry import Box, Size
from hires.tiling.resize import Enlarged
from hires.tiling.vae import decode_bands, encode_tiles
from hires.types import DecodePlan


def up(z: Tensor) -> Tensor:
    """A pointwise decoder: every cell becomes 8 x 8 equal pixels."""
    return F.interpolate(z[:, :3] * 2, scale_factor=8, mode="nearest")


def down(x: Tensor) -> Tensor:
    return F.avg_pool2d(torch.cat([x, x[:, :1]], dim=1), 8)


def whole(x: Tensor) -> Enlarged:
    size = Size(x.shape[-2], x.shape[-1])
    return Enlarged(x, size, Box(0, 0, size.height, size.width))


def plan(tile: int, overlap: int) -> DecodePlan:
    return DecodePlan(tile_cells=tile, overlap_cells=overlap, dtype="fp32")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 24), st.integers(0, 12), st.integers(1, 2))
def test_bands_join_to_the_whole_for_a_pointwise_decoder(h: int, w: int, tile: int, overlap: int, batch: int) -> None:
    z = torch.randn(batch, 4, h, w)
    bands = list(decode_bands(up, z, plan(tile, min(overlap, tile - 1)), 8))
    assert all(band.shape[-1] == 8 * w for band in bands)
    torch.testing.assert_close(torch.cat(bands, dim=-2), up(z), rtol=0, atol=2e-6)


def test_one_tile_is_the_module_bit_for_bit() -> None:
    z, x = torch.randn(1, 4, 9, 13), torch.randn(1, 3, 72, 104)
    assert torch.equal(torch.cat(list(decode_bands(up, z, plan(16, 0), 8)), dim=-2), up(z))
    assert torch.equal(encode_tiles(down, whole(x), plan(16, 0), 8), down(x))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(2, 16), st.integers(0, 8))
def test_encoded_tiles_join_to_the_whole_for_a_pointwise_encoder(h: int, w: int, tile: int, overlap: int) -> None:
    x = torch.randn(1, 3, 8 * h, 8 * w)
    torch.testing.assert_close(encode_tiles(down, whole(x), plan(tile, min(overlap, tile - 1)), 8), down(x), rtol=0, atol=2e-6)


def test_bands_leave_before_the_rest_is_decoded() -> None:
    decoded: list[int] = []

    def watching(z: Tensor) -> Tensor:
        decoded.append(1)
        return up(z)

    bands = decode_bands(watching, torch.randn(1, 4, 64, 16), plan(16, 4), 8)
    first = next(bands)
    assert first.shape == (1, 3, 96, 128)
    assert len(decoded) == 1


def test_an_error_of_the_decoder_passes() -> None:
    def broken(z: Tensor) -> Tensor:
        raise ValueError("not memory")

    with pytest.raises(ValueError, match="not memory"):
        list(decode_bands(broken, torch.randn(1, 4, 8, 8), plan(8, 0), 8))
