"""Seams on boxes: the same visibility as on the whole picture, a null that is one, and what is put there is found."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hires.images.boxes import ArraySource, luma
from hires.metrics.seams import comb_power, lattice_power, profiles, seam_lines, seam_visibility, seams
from hires.tiling.geometry import Size, TileGrid, make_grid
from tests.support.pictures import Floats, coded, grey, textured

DATA = Path(os.environ.get("HIRES_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
PHOTOS = ("kodim19.png", "kodim23.png", "flower_BSD3_2268x1512.png", "seeding_CC0_5312x2988.jpg")


def offsets(grid: TileGrid, step: float, seed: int = 0) -> Floats:
    """A random level of -step or +step for each part of the picture between the grid's lines."""
    rows, cols = seam_lines(grid, 1)
    levels = step * np.random.default_rng(seed).choice((-1.0, 1.0), (len(rows) + 1, len(cols) + 1))
    down, across = np.arange(grid.canvas.height), np.arange(grid.canvas.width)
    return levels[np.searchsorted(rows, down, "right")][:, np.searchsorted(cols, across, "right")].astype(np.float32)


def measured(picture: Floats, grid: TileGrid, seed: int = 0, fakes: int = 99):  # type: ignore[no-untyped-def]
    return seams(profiles(ArraySource(grey(picture)), *seam_lines(grid, 1)), seed, fakes)


@pytest.mark.parametrize(("size", "tile"), [(Size(240, 320), 96), (Size(601, 1203), 256), (Size(90, 7000), 90)])
def test_visibility_from_profiles_is_that_of_the_whole_picture(size: Size, tile: int) -> None:
    """Sizes of one band and of several."""
    grid = make_grid(size, Size(tile, tile), tile // 4)
    picture = textured(size.height, size.width) + offsets(grid, 0.004)
    rows, cols = seam_lines(grid, 1)
    found = measured(picture, grid)
    assert found.visibility == pytest.approx(seam_visibility(luma(grey(picture)), rows, cols), rel=1e-6)


@pytest.mark.slow
def test_without_seams_the_score_is_one_and_the_p_value_uniform() -> None:
    """Kolmogorov-Smirnov's distance of 80 p-values to the uniform law: 0.152 at 5 %."""
    grid = make_grid(Size(160, 224), Size(64, 64), 16)
    found = [measured(textured(160, 224, seed), grid, seed) for seed in range(80)]
    values = np.sort([one.p_value for one in found])
    steps = np.arange(1, 81) / 80
    assert max(np.abs(values - steps).max(), np.abs(values - steps + 1 / 80).max()) < 0.152
    assert np.mean([one.score for one in found]) == pytest.approx(1, abs=0.03)


def test_the_score_rises_with_the_step_and_the_p_value_falls() -> None:
    grid = make_grid(Size(400, 600), Size(128, 128), 32)
    picture = textured(400, 600)
    found = [measured(picture + offsets(grid, step), grid) for step in (0.0, 0.01, 0.02, 0.04)]
    scores = [one.score for one in found]
    assert scores[0] < 1.15 and found[0].p_value > 0.05
    assert scores == sorted(scores)
    assert scores[2] > 1.25 and found[2].p_value == 0.01
    assert scores[3] > 1.8


def test_the_seed_decides_and_more_fakes_sharpen_the_p_value() -> None:
    grid = make_grid(Size(160, 224), Size(64, 64), 16)
    picture = textured(160, 224) + offsets(grid, 0.03)
    assert measured(picture, grid, seed=3) == measured(picture, grid, seed=3)
    assert measured(picture, grid, seed=3) != measured(picture, grid, seed=4)
    assert measured(picture, grid, fakes=199).p_value == pytest.approx(1 / 200)


def test_no_lines_and_nothing_in_the_picture() -> None:
    assert measured(textured(64, 80), make_grid(Size(64, 80), Size(128, 128), 0)).score == 1
    flat = measured(np.full((96, 128), 0.3, dtype=np.float32), make_grid(Size(96, 128), Size(32, 32), 8))
    assert (flat.score, flat.p_value) == (1, 1)


@pytest.mark.parametrize("name", PHOTOS)
def test_photographs_have_no_seams_and_tiles_laid_on_them_have(name: str) -> None:
    if not (DATA / "photos" / name).is_file():
        pytest.skip(f"{DATA / 'photos' / name} is absent")
    with Image.open(DATA / "photos" / name) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    size = Size(*pixels.shape[:2])
    tile = 256 if size.height < 1000 else 512
    grid = make_grid(size, Size(tile, tile), tile // 4)
    lines = seam_lines(grid, 1)
    clean = seams(profiles(ArraySource(pixels), *lines))
    assert clean.score < 1.25
    assert clean.p_value > 0.02
    laid = pixels / 255 + offsets(grid, 0.008)[..., None]
    seen = seams(profiles(ArraySource(coded(laid.astype(np.float32))), *lines))
    assert seen.score > 1.25
    assert seen.p_value <= 0.02


@pytest.mark.parametrize(("period", "height"), [(20, 2.0), (8, 1.0), (37.5, 4.0), (200, 30.0)])
def test_power_of_a_comb_on_noise(period: float, height: float) -> None:
    """Against 1 + 2 N h^2 / (3 v p^2); a period that is no whole number has its teeth on the nearest lines."""
    extent, variance = 1603, 2.0
    energy = np.sqrt(variance) * np.random.default_rng(0).standard_normal((300, extent))
    energy[:, np.rint(np.arange(3, extent, period)).astype(int)] += height
    on, between = comb_power(energy, period)
    assert on / between == pytest.approx(1 + 2 * extent * height**2 / (3 * variance * period**2), rel=0.1)


def test_a_decoders_cells_and_steps_of_either_sign_are_a_lattice() -> None:
    picture = textured(300, 420)
    rng = np.random.default_rng(0)
    down, across = (rng.choice((-1.0, 1.0), -(-extent // 8)).repeat(8)[:extent] for extent in picture.shape)
    signs = down[:, None] + across
    cells = profiles(ArraySource(grey((picture + 0.02 * signs).astype(np.float32))), (), ())
    power, none = lattice_power(cells, 8, 8), lattice_power(cells, 11, 11)
    assert power is not None and none is not None
    assert power > 8
    assert abs(none) < 4


def test_lattice_power_is_nothing_without_one_and_needs_four_periods() -> None:
    values = [
        lattice_power(profiles(ArraySource(grey(textured(300, 420, seed))), (100, 200), (140, 280)), 30, 28)
        for seed in range(20)
    ]
    assert np.mean([value for value in values if value is not None]) == pytest.approx(0, abs=1)
    short = profiles(ArraySource(grey(textured(64, 80))), (), ())
    assert lattice_power(short, 30, 30) is None
    assert lattice_power(profiles(ArraySource(np.full((64, 80, 3), 0.5)), (), ()), 8, 8) == 0


def test_random_grids_on_cells_leave_out_what_the_cells_show() -> None:
    """Steps across every eighth line are in the true grid and in grids on cells alike, not in those at any pixel."""
    picture, rows = textured(512, 160), tuple(range(64, 512, 64))
    picture += 0.05 * (np.arange(512)[:, None] // 8 % 2)
    found = profiles(ArraySource(grey(picture)), rows, ())
    anywhere, on_cells = seams(found), seams(found, cell_px=8)
    assert anywhere.score > 2 and anywhere.p_value < 0.1
    assert on_cells.score == pytest.approx(1, abs=0.1) and on_cells.p_value > 0.05
