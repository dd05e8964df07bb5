from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hires.tiling.geometry import Box, Size, axis_starts, least_overlap, make_grid

axes = st.integers(1, 600).flatmap(
    lambda tile: st.tuples(st.integers(1, 3000), st.just(tile), st.integers(0, max(0, min(tile - 1, tile * 3 // 4))))
)


@given(axes)
def test_equal_tiles_cover_the_axis_with_the_overlap(axis: tuple[int, int, int]) -> None:
    extent, tile, overlap = axis
    starts = axis_starts(extent, tile, overlap)
    if tile >= extent:
        assert starts == (0,)
        return
    assert starts[0] == 0
    assert starts[-1] + tile == extent
    assert least_overlap(starts, tile) >= overlap
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert max(steps) - min(steps) <= 1  # spread evenly: no sliver
    assert (len(starts) - 2) * (tile - overlap) + tile < extent  # one tile fewer would not do


def test_known_grids() -> None:
    assert axis_starts(128, 32, 8) == (0, 24, 48, 72, 96)
    assert axis_starts(33, 32, 0) == (0, 1)
    grid = make_grid(Size(40, 100), Size(64, 32), 8)
    assert grid.tile == Size(40, 32)
    assert list(grid.boxes())[:2] == [Box(0, 0, 40, 32), Box(0, 23, 40, 32)]  # row-major
    assert grid.count == 4


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 8), (8, -1)])
def test_senseless_tiles_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"tile {tile} with overlap {overlap}"):
        axis_starts(100, tile, overlap)


@given(st.integers(33, 300), st.integers(1, 24), st.integers(-40, 40), st.integers(-40, 40))
def test_a_shifted_grid_still_covers(extent: int, overlap: int, rows: int, cols: int) -> None:
    grid = make_grid(Size(extent, extent + 17), Size(32, 32), overlap).shifted(rows, cols)
    for starts, length in ((grid.tops, extent), (grid.lefts, extent + 17)):
        assert starts[0] == 0
        assert starts[-1] + 32 == length
        assert least_overlap(starts, 32) >= 1
        assert sorted(set(starts)) == list(starts)


def test_sizes_are_height_then_width_and_print_as_people_type_them() -> None:
    assert str(Size(1080, 1920)) == "1920x1080"
    assert Size(64, 32).divided(8) == Size(8, 4)
