"""Law 6 where it begins: no size is ever changed on the way."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hires.errors import SizeError
from hires.resolution import check_size, cover, make_bins, nearest_bin, parse_size, snap, stage_canvases
from hires.tiling.geometry import Size


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096x2160", Size(2160, 4096)), (" 640 X 480 ", Size(480, 640)), ("800×600", Size(600, 800)), ("1024", Size(1024, 1024))],
)
def test_width_comes_first_in_text_only(text: str, size: Size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["0x0", "100x", "99999999x8", "x100", "", "12.5x3", "-64x64", "64x64x64", "100x1", "9" * 40 + "x64"]
)
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(SizeError, match=r"size"):
        parse_size(text)


def test_more_pixels_than_any_plan_reaches_are_refused() -> None:
    with pytest.raises(SizeError, match="megapixels"):
        check_size(Size(131_072, 131_072))


@given(st.integers(16, 9000), st.integers(16, 9000), st.sampled_from([8, 32, 64]))
def test_a_snapped_canvas_holds_the_size(h: int, w: int, align: int) -> None:
    canvas = snap(Size(h, w), align)
    assert canvas.height % align == 0
    assert canvas.width % align == 0
    assert 0 <= canvas.height - h < align
    assert 0 <= canvas.width - w < align


def test_cover_never_returns_another_size() -> None:
    """20,000 sizes, the ones that break other tools (392x720 from a 720x1280 bin) among them."""
    rng = random.Random(0)
    cases = [(Size(720, 1280), Size(720, 392))]
    cases += [
        (Size(rng.randint(1, 3000), rng.randint(1, 3000)), Size(rng.randint(1, 9000), rng.randint(1, 9000)))
        for _ in range(20_000)
    ]
    for source, target in cases:
        resized, box = cover(source, target)
        assert (box.height, box.width) == (target.height, target.width)
        assert box.top >= 0
        assert box.left >= 0
        assert box.bottom <= resized.height
        assert box.right <= resized.width
        assert resized.height == target.height or resized.width == target.width


@given(st.integers(64, 16384), st.integers(64, 16384))
def test_stages_at_most_about_double_and_end_at_the_canvas(h: int, w: int) -> None:
    bins = make_bins(256, 32)
    canvas = snap(Size(h, w), 32)
    stages = stage_canvases(canvas, bins, 32)
    assert stages[-1] == canvas
    areas = [stage.area for stage in stages]
    assert areas == sorted(areas)
    for small, large in itertools.pairwise(stages):
        coarse = min(small.height, small.width) < 128  # rounding to 32 px weighs more on a thin strip
        assert large.area <= (9 if coarse else 4.9) * small.area
    ratios = [math.log(stage.width / stage.height * h / w) for stage in stages if min(stage.height, stage.width) > 64]
    assert all(abs(ratio) < 0.5 for ratio in ratios)  # little is cropped away between stages
    assert all(stage.height % 32 == 0 and stage.width % 32 == 0 for stage in stages)


def test_the_common_sizes_double_exactly() -> None:
    sides = [stage.height for stage in stage_canvases(Size(8192, 8192), make_bins(256, 32), 32)]
    assert sides == [256, 512, 1024, 2048, 4096, 8192]
    assert [str(s) for s in stage_canvases(Size(4096, 4096), make_bins(1024, 64), 32)] == [
        "1024x1024",
        "2048x2048",
        "4096x4096",
    ]


def test_bins_treat_portrait_and_landscape_alike() -> None:
    bins = make_bins(1024, 64)
    assert nearest_bin(Size(1024, 1024), bins) == Size(1024, 1024)
    wide, tall = nearest_bin(Size(1080, 1920), bins), nearest_bin(Size(1920, 1080), bins)
    assert abs(wide.height / wide.width - tall.width / tall.height) < 0.1
    assert all(0.85 < b.area / 1024**2 < 1.15 for b in bins)
