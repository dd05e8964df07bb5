from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.demo.held_out import FIRST_SEED, held_out_kinds, held_out_scenes
from benchmarks.demo.scenes import caption, draw, draw_bands, kinds, scene
from hires.images.boxes import luma
from hires.metrics.fidelity import band_energy
from hires.tiling.geometry import Box, Size


def test_a_crop_is_part_of_the_whole() -> None:
    whole = draw(scene(5), Size(300, 420))
    for box in (Box(0, 0, 100, 100), Box(123, 77, 90, 200), Box(200, 300, 100, 120)):
        part = draw(scene(5), Size(300, 420), box)
        inner = slice(1, -1)  # the slope at a crop's first and last column is one-sided
        np.testing.assert_allclose(part[:, inner], whole[box.rows, box.cols][:, inner], atol=2e-5)
    np.testing.assert_allclose(np.concatenate(list(draw_bands(scene(5), Size(300, 420), 64))), whole, atol=2e-5)


def test_a_seed_is_a_picture() -> None:
    assert np.array_equal(draw(scene(9), Size(64, 64)), draw(scene(9), Size(64, 64)))
    assert not np.array_equal(draw(scene(9), Size(64, 64)), draw(scene(10), Size(64, 64)))
    assert len(scene(9).disks) == 1


def test_a_larger_drawing_holds_more_detail() -> None:
    """Energy beyond a 256 px picture's Nyquist keeps coming as the canvas grows."""
    energies = [band_energy(luma(draw(scene(4), Size(s, s))), 128 / s) for s in (512, 1024)]
    assert energies == sorted(energies)
    assert energies[0] > 1e-5


def test_captions() -> None:
    assert (
        caption(("moon", "left", "purple", "lake", "night")) == "a moon on the left over purple mountains and a lake at night"
    )
    assert len(kinds()) == len(set(kinds())) == 324


def test_training_never_draws_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.demo import data

    rng = np.random.default_rng(0)
    drawn = [data.training_scene(rng) for _ in range(3000)]
    assert not {d.kind for d in drawn} & held_out_kinds()
    assert max(d.seed for d in drawn) < FIRST_SEED <= min(s.seed for s in held_out_scenes(32))
    assert len({d.kind for d in drawn}) > 250
    monkeypatch.setattr(data, "FIRST_SEED", 1)  # a draw that could only be seed 0, whatever its kind
    assert data.training_scene(rng).seed == 0


def test_the_held_out_file_lists_what_it_should() -> None:
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "demo" / "held_out.json").read_text())["scenes"]
    assert len(rows) == len(held_out_kinds()) == 32
    assert held_out_scenes(1)[0].caption == "a sun on the right over green mountains and a lake at dusk"
    assert held_out_kinds() <= set(kinds())
    with pytest.raises(ValueError, match="lists 32 scenes, 33 asked for"):
        held_out_scenes(33)
