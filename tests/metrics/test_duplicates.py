"""Copies of a subject: as many as were planted, none in what has no objects."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.demo.scenes import draw, scene, with_disks
from hires.images.boxes import ArraySource, LanczosSource, luma
from hires.metrics.duplicates import find_copies, find_duplicates, subject_box
from hires.tiling.geometry import Box, Size
from tests.support.pictures import Floats, coded, grey, textured

PLACES = ((30, 40), (200, 330), (488, 100), (470, 616), (0, 500), (250, 20), (500, 502))  # two lie where boxes meet


def thing(side: int = 24) -> Floats:
    """A bright disk with a soft edge."""
    rows, cols = np.mgrid[:side, :side] - (side - 1) / 2
    return (0.35 * np.clip(9 - np.hypot(rows, cols), 0, 1)).astype(np.float32)


def base_picture(seed: int) -> Floats:
    picture = textured(128, 160, 50 + seed) * np.float32(0.5)
    picture[40:64, 60:84] += thing()
    return picture


def subject_of(picture: Floats) -> Floats:
    box = subject_box(picture)
    return grey(picture[box.rows, box.cols])


def planted(count: int, seed: int) -> Floats:
    picture = textured(540, 660, seed) * np.float32(0.5)
    for top, left in PLACES[:count]:
        picture[top : top + 24, left : left + 24] += thing()
    return picture


@pytest.mark.parametrize("seed", range(3))
def test_the_subject_is_the_thing_in_the_picture(seed: int) -> None:
    box = subject_box(base_picture(seed))
    assert abs(box.top + box.height / 2 - 52) < 4
    assert abs(box.left + box.width / 2 - 72) < 4


def test_a_horizon_is_no_subject() -> None:
    picture = textured(128, 160, 3) * np.float32(0.05)
    picture[90:] += 0.5
    picture[20:44, 100:124] += thing()
    box = subject_box(picture)
    assert box.bottom < 60 and box.left > 80


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, 1), (3, 2), (7, 0), (7, 1)])
def test_as_many_copies_as_were_planted(count: int, seed: int) -> None:
    found = find_copies(ArraySource(grey(planted(count, seed))), subject_of(base_picture(seed)))
    assert len(found.copies) == count
    centres = [(copy.box.top + copy.box.height / 2, copy.box.left + copy.box.width / 2) for copy in found.copies]
    for top, left in PLACES[:count]:
        assert min(np.hypot(y - top - 12, x - left - 12) for y, x in centres) < 4
    assert all(copy.likeness >= found.threshold for copy in found.copies)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_texture_has_no_copies_of_texture(seed: int) -> None:
    """Smooth fields resemble each other by chance: what their phases drawn anew would reach does not count."""
    found = find_copies(ArraySource(grey(textured(540, 660, seed))), subject_of(textured(128, 160, 90 + seed)))
    assert found.copies == ()


def test_a_faint_copy_and_a_larger_one_are_none() -> None:
    picture = textured(300, 400, 5) * np.float32(0.1) + 0.3
    subject = grey(np.float32(0.3) + thing())
    picture[20:44, 30:54] += 0.25 * thing()
    picture[100:196, 200:296] += thing().repeat(4, 0).repeat(4, 1)
    assert find_copies(ArraySource(grey(picture)), subject).copies == ()
    picture[240:264, 60:84] += thing()
    assert len(find_copies(ArraySource(grey(picture)), subject).copies) == 1


def test_a_flat_subject_and_one_larger_than_the_picture() -> None:
    picture = ArraySource(grey(textured(60, 80)))
    assert find_copies(picture, np.full((20, 20, 3), 0.5, dtype=np.float32)).copies == ()
    assert find_copies(picture, grey(textured(70, 20))).copies == ()


@pytest.mark.parametrize(("count", "seed"), [(0, 3_000_007), (0, 3_000_012), (2, 3_000_005), (3, 3_000_012)])
def test_suns_of_native_size_on_a_large_landscape(count: int, seed: int) -> None:
    """A procedural scene four times its base's side, whose own sun is four times as large; copies are cut from the base."""
    truth = with_disks(scene(seed), 1)
    base, large = (coded(draw(truth, Size(side, side))) for side in (160, 640))
    box = subject_box(luma(base))
    for top, left in ((40, 60), (210, 500), (520, 300))[:count]:
        large[top : top + box.height, left : left + box.width] = base[box.rows, box.cols]
    assert len(find_duplicates(ArraySource(large), base).copies) == count


@pytest.mark.parametrize("times", [1, 2])
def test_an_enlargement_duplicates_nothing(times: int) -> None:
    """Not even itself, at its own size."""
    base = coded(base_picture(0))
    size = Size(128 * times, 160 * times)
    large = LanczosSource(base, size).read(Box(0, 0, size.height, size.width))
    assert find_duplicates(ArraySource(large), base).copies == ()
    if times == 1:
        assert len(find_copies(ArraySource(large), subject_of(base_picture(0))).copies) == 1
