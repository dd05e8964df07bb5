from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hires.tiling.geometry import Box, Size, cover
from hires.tiling.resize import Enlarged, Padded


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.floats(1.0, 3.0), st.floats(1.0, 3.0), st.data())
def test_a_crop_is_part_of_the_whole(h: int, w: int, sy: float, sx: float, data: st.DataObject) -> None:
    source = torch.randn(1, 3, h, w)
    target = Size(int(h * sy), int(w * sx))
    view = Enlarged(source, *cover(Size(h, w), target))
    whole = view.crop(Box(0, 0, target.height, target.width))
    assert whole.shape == (1, 3, target.height, target.width)
    top, left = data.draw(st.integers(0, target.height - 1)), data.draw(st.integers(0, target.width - 1))
    part = Box(top, left, data.draw(st.integers(1, target.height - top)), data.draw(st.integers(1, target.width - left)))
    torch.testing.assert_close(view.crop(part), whole[..., part.rows, part.cols], rtol=0, atol=1e-5)


def test_a_constant_stays_and_a_ramp_stays_straight() -> None:
    view = Enlarged(torch.full((1, 1, 9, 9), 0.7), Size(20, 31), Box(0, 0, 20, 31))
    torch.testing.assert_close(view.crop(Box(0, 0, 20, 31)), torch.full((1, 1, 20, 31), 0.7))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    inner = Enlarged(ramp, Size(32, 32), Box(0, 0, 32, 32)).crop(Box(8, 8, 1, 16)).flatten()
    torch.testing.assert_close(inner.diff(), torch.full((15,), 0.5), rtol=0, atol=1e-5)


def test_it_is_the_bicubic_that_antialiased_resizing_uses() -> None:
    source = torch.randn(1, 2, 12, 15)
    expected = F.interpolate(source, size=(30, 47), mode="bicubic", align_corners=False, antialias=True)
    whole = Enlarged(source, Size(30, 47), Box(0, 0, 30, 47)).crop(Box(0, 0, 30, 47))
    inner = (slice(6, -6), slice(6, -6))
    torch.testing.assert_close(whole[..., inner[0], inner[1]], expected[..., inner[0], inner[1]], rtol=0, atol=1e-5)


def test_padding_repeats_the_last_row_and_column() -> None:
    pixels = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3) * 5
    found = Padded(pixels, Size(8, 8)).crop(Box(1, 2, 7, 6))[0].permute(1, 2, 0)
    wanted = np.pad(pixels, ((0, 5), (0, 3), (0, 0)), mode="edge")[1:8, 2:8]
    np.testing.assert_allclose(found.numpy(), wanted / 127.5 - 1, atol=1e-6)
