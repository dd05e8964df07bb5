"""Sources of boxes: what is read is the picture, means are integrals, an enlargement is Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hires.errors import RequestError
from hires.images.boxes import (
    BAND_VALUES,
    ArraySource,
    LanczosSource,
    averaged,
    band_boxes,
    bits_of,
    box_means,
    equal_parts,
    interval_means,
    luma,
    unit,
)
from hires.refine.low_pass import area_axis
from hires.tiling.geometry import Box, Size
from tests.support.pictures import coded, textured


def test_depths_and_ranges() -> None:
    pixels = np.full((3, 5, 3), 51, dtype=np.uint8)
    deep = pixels.astype(np.uint16) * 257
    floats = np.full((3, 5, 3), 0.2, dtype=np.float64)
    assert [bits_of(ArraySource(p)) for p in (pixels, deep, floats)] == [8, 16, None]
    for picture in (pixels, deep, floats):
        np.testing.assert_allclose(unit(picture), 0.2, rtol=1e-6)
        np.testing.assert_allclose(luma(picture), 0.2, rtol=1e-6)


@pytest.mark.parametrize("pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.int64)])
def test_what_is_no_picture_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(RequestError, match="give"):
        ArraySource(pixels)


@given(st.integers(1, 3000), st.integers(1, 9000), st.integers(0, 2), st.integers(0, 2))
def test_bands_cover_every_row_once_and_stay_small(height: int, width: int, before: int, after: int) -> None:
    read = list(band_boxes(Size(height, width), before, after))
    starts = [box.top + lead for box, lead in read]
    for (box, _), start, stop in zip(read, starts, [*starts[1:], height], strict=True):
        assert (box.top, box.bottom) == (max(0, start - before), min(height, stop + after))
        assert 0 < (stop - start) * width <= max(BAND_VALUES, width)
    assert starts[0] == 0


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_an_average_is_the_product_of_two_axes(height: int, width: int, data: st.DataObject) -> None:
    """Against the low-pass's weights, written out as matrices."""
    few = Size(data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    pixels = np.random.default_rng(height * 50 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wanted = np.einsum("ih,jw,hwc->ijc", area_axis(height, few.height), area_axis(width, few.width), pixels / 255)
    np.testing.assert_allclose(averaged(ArraySource(pixels), few), wanted, atol=1e-6)


def test_means_do_not_depend_on_bands() -> None:
    """Bands of 87 rows: intervals begin and end in the middle of them, and inside pixels."""
    pixels = np.random.default_rng(0).random((200, 6000, 3))
    assert len(list(band_boxes(Size(200, 6000)))) > 2
    rows, cols = np.asarray([[0.0, 200.0], [80.25, 95.5], [199.5, 200.0]]), np.asarray([[10.5, 11.25], [0.0, 6000.0]])
    found = interval_means(ArraySource(pixels), rows, cols)
    np.testing.assert_allclose(found[0, 1], pixels.mean((0, 1)), atol=1e-6)
    weights = np.concatenate([[0.75], np.ones(14), [0.5]])
    np.testing.assert_allclose(found[1, 1], weights @ pixels[80:96].mean(1) / 15.25, atol=1e-6)
    np.testing.assert_allclose(found[2, 0], (0.5 * pixels[199, 10] + 0.25 * pixels[199, 11]) / 0.75, atol=1e-6)


def test_equal_parts_end_where_the_axis_ends() -> None:
    parts = equal_parts(1000, 7)
    assert parts[0, 0] == 0 and parts[-1, 1] == 1000
    np.testing.assert_array_equal(parts[1:, 0], parts[:-1, 1])


def test_tiles_beyond_the_picture_are_cut() -> None:
    pixels = coded(textured(50, 70))
    means = box_means(ArraySource(pixels), (0, 30), (0, 40), Size(32, 40), (1.0, 1.0))
    np.testing.assert_allclose(means[1, 1], pixels[30:, 40:].mean((0, 1)) / 255, atol=1e-6)
    half = box_means(ArraySource(pixels[::2, ::2]), (0, 30), (0, 40), Size(32, 40), (0.5, 0.5))
    np.testing.assert_allclose(half[0, 0], pixels[:32:2, :40:2].mean((0, 1)) / 255, atol=1e-6)


@pytest.mark.parametrize("size", [Size(96, 128), Size(151, 203), Size(48, 64)])
def test_a_box_of_an_enlargement_is_that_of_the_whole(size: Size) -> None:
    base = coded(np.stack([textured(48, 64, seed) for seed in range(3)], axis=-1))
    whole = np.asarray(Image.fromarray(base).resize((size.width, size.height), Image.Resampling.LANCZOS))
    for box in (Box(0, 0, size.height, size.width), Box(7, 11, 30, 29), Box(size.height - 9, size.width - 5, 9, 5)):
        found = LanczosSource(base, size).read(box)
        assert np.abs(found.astype(int) - whole[box.rows, box.cols]).max() <= 1
