"""Measures on cases with known answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.demo.held_out import held_out_scenes
from benchmarks.demo.scenes import Disk, draw, draw_bands, scene, with_disks
from benchmarks.disks import FoundDisk, find_disks, local_band_energy, lopsided_disks, mean_colour, third_of
from hires.images.boxes import luma
from hires.metrics.fidelity import band_energy, psnr
from hires.metrics.seams import lattice_score, seam_lines, seam_score
from hires.tiling.geometry import Size, make_grid
from tests.support.pictures import textured


def test_seam_score_rises_with_the_step_and_is_one_without() -> None:
    picture = textured(512, 512)
    grid = make_grid(Size(64, 64), Size(16, 16), 0)
    rows, cols = seam_lines(grid, 8)
    assert rows == cols == (128, 256, 384)
    scores = []
    checker = (np.indices((4, 4)).sum(axis=0) % 2).repeat(128, 0).repeat(128, 1)
    for step in (0.0, 0.002, 0.005, 0.01, 0.02):
        scores.append(seam_score(picture + step * (2 * checker.astype(np.float32) - 1), rows, cols))
    assert scores[0] < 1.25
    assert scores == sorted(scores)
    assert scores[2] > 1.4
    assert scores[4] > 2.5


def test_a_ridge_on_a_line_is_no_seam_and_an_offset_of_half_a_grey_level_is() -> None:
    grid = make_grid(Size(96, 96), Size(32, 32), 8)
    rows, cols = seam_lines(grid, 8)
    picture = luma(draw(held_out_scenes(1)[0], Size(768, 768)))
    ridge = picture.copy()
    ridge[rows[0] :, : cols[0]] *= 0.6
    assert seam_score(picture, rows, cols) < 1.25
    assert seam_score(ridge, rows, cols) < 1.25
    sides = [np.searchsorted(lines, np.arange(768), side="right") % 2 for lines in (rows, cols)]
    offset = np.where(sides[0][:, None] == sides[1][None, :], 0.002, -0.002).astype(np.float32)
    assert seam_score(picture + offset, rows, cols) > 1.5


def striped(side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Stripes down and across, 256 x 320 px."""
    return ((np.arange(256)[:, None] // side) % 2 + (np.arange(320) // side) % 2).astype(np.float32)


def test_a_seam_is_told_from_the_cells_that_it_lies_on() -> None:
    """Steps at every cell are the decoder's: no seam against grids on its cells, and one more on top of them is."""
    picture = textured(256, 320)
    rows, cols = (64, 128, 192), (64, 128, 192, 256)
    cells = picture + 0.05 * striped(8)
    assert seam_score(cells, rows, cols) > 1.5
    assert seam_score(cells, rows, cols, cell_px=8) < 1.15
    tiles = cells + 0.2 * striped(64)
    assert seam_score(tiles, rows, cols, cell_px=8) > 1.3


def test_a_decoders_cells_are_seen_as_a_lattice() -> None:
    picture = textured(512, 512)
    assert lattice_score(picture, 8) == pytest.approx(1, abs=0.1)
    stripes = (np.arange(512) // 8 % 2).astype(np.float32)
    cells = picture + 0.004 * (stripes[:, None] + stripes[None, :])
    assert lattice_score(cells, 8) > 1.15


def test_no_lines_no_seam() -> None:
    assert seam_score(textured(64, 64), (), ()) == 1.0


def test_seam_lines_are_where_overlapping_tiles_begin_and_end() -> None:
    rows, cols = seam_lines(make_grid(Size(40, 32), Size(32, 32), 8), 8)
    assert rows == (64, 256)
    assert cols == ()


def test_band_energy_of_waves() -> None:
    x = np.arange(256, dtype=np.float32)
    low = np.broadcast_to(0.3 * np.sin(2 * np.pi * x * 8 / 256), (256, 256)).astype(np.float32)
    high = np.broadcast_to(0.1 * np.sin(2 * np.pi * x * 64 / 256), (256, 256)).astype(np.float32)
    assert band_energy(low + high, 0.125) == pytest.approx(0.1**2 / 2, rel=0.02)
    assert band_energy(low + high, 0.0) == pytest.approx(0.3**2 / 2 + 0.1**2 / 2, rel=0.02)
    assert band_energy(low, 0.125) < 1e-8


def test_local_energy_counts_every_part_alike_and_leaves_disks_out() -> None:
    x = np.arange(256, dtype=np.float32)
    wave = np.broadcast_to(0.1 * np.sin(2 * np.pi * x / 4), (256, 256)).astype(np.float32)
    assert local_band_energy(wave, 0.125) == pytest.approx(0.1**2 / 2, rel=0.02)
    corner = np.zeros((256, 256), dtype=np.float32)
    corner[:64, :64] = wave[:64, :64]
    middle = np.roll(corner, (96, 96), axis=(0, 1))
    assert local_band_energy(corner, 0.2) == pytest.approx(local_band_energy(middle, 0.2), rel=0.25)
    assert band_energy(middle, 0.2) > 20 * band_energy(corner, 0.2), "one window over all forgets the corners"
    disk = FoundDisk(x=128 / 256, y=128 / 256, radius=46 / 256, likeness=1.0)
    assert local_band_energy(middle, 0.2, [disk]) < 1e-6
    assert local_band_energy(corner, 0.2, [disk]) == pytest.approx(local_band_energy(corner, 0.2), rel=0.6)


def test_an_enlarged_picture_has_no_energy_beyond_its_base() -> None:
    from PIL import Image

    picture = textured(256, 256)
    small = Image.fromarray((picture * 255).astype(np.uint8)).resize((64, 64), Image.Resampling.LANCZOS)
    enlarged = np.asarray(small.resize((256, 256), Image.Resampling.LANCZOS)).astype(np.float32) / 255
    assert band_energy(enlarged, 64 / 512) < 0.1 * band_energy(picture, 64 / 512)


@pytest.mark.parametrize(
    ("side", "scenes"), [(256, 4), pytest.param(256, 24, marks=pytest.mark.slow), pytest.param(1024, 8, marks=pytest.mark.slow)]
)
def test_the_disk_counter_is_exact(side: int, scenes: int) -> None:
    for seed in range(scenes):
        truth = with_disks(scene(3_000_000 + seed), seed % 4)
        found = find_disks(draw(truth, Size(side, side)))
        assert len(found) == seed % 4, truth
        for disk in truth.disks:
            assert any(abs(f.x - disk.x) < 0.01 and abs(f.y - disk.y) < 0.01 for f in found)
            assert third_of(disk.x) in {third_of(f.x) for f in found}


@pytest.mark.slow
@pytest.mark.parametrize("side", [1024, 4096])
def test_the_disk_counter_is_exact_on_200_scenes(side: int) -> None:
    wrong, lopsided = [], 0
    for seed in range(200):
        truth = with_disks(scene(4_000_000 + seed), seed % 4)
        picture = np.concatenate([(band * 255 + 0.5).astype(np.uint8) for band in draw_bands(truth, Size(side, side))])
        disks = find_disks(picture)
        lopsided += bool(lopsided_disks(picture, disks))
        if len(disks) != seed % 4:
            wrong.append(truth)
    assert not wrong
    assert lopsided == 0, "a disk's glitter on a lake is no double of it"


def test_a_lopsided_double_is_seen() -> None:
    truth = replace(scene(12), disks=(Disk(kind="sun", x=0.2, y=0.25, radius=0.08),))
    picture = draw(truth, Size(256, 256))
    assert lopsided_disks(picture, find_disks(picture)) == []
    row, col = np.mgrid[:256, :256] + 0.5
    egg = ((col - 190) / 24) ** 2 + ((row - 60) / 16) ** 2 < 1
    picture[egg] = picture[60, 52]
    disks = find_disks(picture)
    assert [third_of(disk.x) for disk in disks] == ["left"]
    assert [third_of(blob.x) for blob in lopsided_disks(picture, disks)] == ["right"]


def test_the_disk_counter_works_on_other_shapes() -> None:
    truth = with_disks(scene(12), 2)
    for size in (Size(512, 768), Size(900, 600)):
        assert len(find_disks(draw(truth, size))) == 2


def test_small_measures() -> None:
    picture = np.zeros((10, 20, 3), dtype=np.uint8)
    picture[5:, :, 0] = 255
    assert mean_colour(picture, (0.5, 1.0), (0.0, 1.0)).tolist() == [1, 0, 0]
    assert luma(picture)[9, 0] == pytest.approx(0.2126)
    assert psnr(np.zeros(4), np.full(4, 0.1), 1.0) == pytest.approx(20)
    assert [third_of(x) for x in (0.1, 0.5, 0.99, 1.0)] == ["left", "middle", "right", "right"]
