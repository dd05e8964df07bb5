"""Renders that start from a picture, and edits: sizes, strengths, what is kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import hires
from hires.cli.app import app
from hires.errors import RequestError, SizeError
from tests.support.checkpoints import Checkpoint

pytestmark = pytest.mark.usefixtures("warm")

PROMPT = "a sun on the right over green mountains and a lake at dusk"


def drawn(height: int = 256, width: int = 256) -> NDArray[np.uint8]:
    """A disk on a gradient."""
    rows, cols = np.mgrid[0:height, 0:width]
    disk = (rows - height / 3) ** 2 + (cols - width / 2) ** 2 < (height / 8) ** 2
    sky = np.stack([rows * 160 // height, cols * 120 // width, 150 + 0 * rows], axis=-1)
    return np.where(disk[..., None], np.uint8([250, 220, 90]), sky).astype(np.uint8)


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.slow
def test_the_stronger_the_more_is_drawn_anew() -> None:
    picture = drawn()
    made = [hires.render(PROMPT, init=picture, strength=s, steps=12, seed=2) for s in (0.1, 0.4, 0.9)]
    assert all(result.size == hires.plan(size="256x256").output for result in made)
    far = [difference(result.pixels, picture) for result in made]
    assert far[0] < far[1] < far[2]
    assert far[0] < 8
    assert [result.plan.stages[0].taken_steps for result in made] == [1, 4, 10]
    assert "4 steps of" in made[1].plan.explain()
    assert "at strength 0.4" in made[1].plan.explain()


def test_at_full_strength_the_picture_is_still_where_it_starts() -> None:
    dark, bright = (np.full((64, 64, 3), value, dtype=np.uint8) for value in (20, 235))
    made = [hires.render(PROMPT, init=picture, strength=1.0, steps=6, seed=2).pixels for picture in (dark, bright)]
    assert not np.array_equal(*made)


def test_a_picture_of_another_shape_fills_the_size_and_odd_sizes_come_back() -> None:
    result = hires.render(PROMPT, init=drawn(200, 333), strength=0.1, steps=10, size="301x211")
    assert result.pixels.shape == (211, 301, 3)
    assert difference(result.pixels, np.asarray(Image.fromarray(drawn(200, 333)).resize((333, 211)))[:, 16:317]) < 12
    assert hires.render(PROMPT, init=drawn(67, 131), strength=0.2, steps=5).pixels.shape == (67, 131, 3)


def test_a_large_picture_is_refined_on_its_canvas_or_drawn_anew_from_a_base(tmp_path: Path) -> None:
    result = hires.render(PROMPT, init=drawn(320, 384), strength=0.3, steps=4)
    assert result.plan.strategy == "tiled"
    assert any("at strength 0.3 the picture's own composition" in note for note in result.plan.notes)
    assert [stage.canvas.height for stage in result.plan.stages] == [320]
    anew = hires.render(PROMPT, init=drawn(320, 384), strength=0.8, steps=3)
    assert [stage.canvas.height for stage in anew.plan.stages] == [256, 320]
    assert [stage.strength for stage in anew.plan.stages] == [0.8, None]
    assert anew.pixels.shape == (320, 384, 3)


def test_the_tile_batch_does_not_change_it() -> None:
    """Law 3, for a picture: small budgets, the same pixels."""
    options: dict[str, Any] = {"init": drawn(320, 384), "strength": 0.4, "steps": 3, "seed": 1}
    whole, small = hires.render(PROMPT, **options), hires.render(PROMPT, vram="30MB", **options)
    assert whole.plan.batch != small.plan.batch
    assert np.abs(whole.pixels.astype(int) - small.pixels.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "64x64", "strength": 0.5}, "strength 0.5: how much of a picture .* give the picture with `init`"),
        ({"init": drawn(), "strength": 0.0}, "strength 0.0: give a number above 0 and up to 1"),
        ({"init": drawn(), "strength": 1.5}, "strength 1.5"),
        ({"init": drawn(), "strength": 0.05, "steps": 10}, r"leaves none of 10 steps: give 0.1 or more"),
        ({"init": "absent.png"}, "picture absent.png: .*give a picture file"),
        ({}, "no size: give `size`"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((RequestError, SizeError), match=message):
        hires.render(PROMPT, **options)


def test_the_command_line_starts_from_a_picture(tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.fromarray(drawn(96, 128)).save(source)
    done = CliRunner().invoke(
        app,
        ["render", PROMPT, "--init", str(source), "--strength", "0.5", "--steps", "4", "-o", str(tmp_path / "a.png"), "--json"],
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"]["stages"][0]["strength"] == 0.5
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (128, 96)


def test_the_command_line_edits(tmp_path: Path, checkpoint: Callable[..., Checkpoint]) -> None:
    made = checkpoint("cosxl-edit")
    source = tmp_path / "in.jpg"
    Image.fromarray(drawn(90, 122)).save(source)
    arguments = ["edit", str(source), "make it winter", "-o", str(tmp_path / "a.png"), "--steps", "2", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--model", str(made.path), "--parts", str(made.parts)])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (122, 90)
    refused = CliRunner().invoke(app, [*arguments, "--model", "demo", "--overwrite"])
    assert refused.exit_code == 2
    assert "does not see the picture" in refused.stderr
    assert "--init IN.png" in refused.stderr
    wrong = CliRunner().invoke(
        app, ["render", "x", "--size", "64x64", "-o", str(tmp_path / "b.png"), "--model", str(made.path)]
    )
    assert wrong.exit_code == 2
    assert "hires edit IN.png" in wrong.stderr
    assert not (tmp_path / "b.png").exists()


@pytest.mark.slow
def test_an_edit_of_a_large_picture_sees_it_at_every_stage(tmp_path: Path, checkpoint: Callable[..., Checkpoint]) -> None:
    made = checkpoint("sdxl-ip2p", "folder")
    result = hires.edit(drawn(96, 160), "make it winter", model=str(made.path), steps=1, strategy="tiled", tile_px=64)
    assert result.plan.stages[0].grid.count > 1
    assert result.pixels.shape == (96, 160, 3)
    keep, free = (
        hires.edit(drawn(64, 64), "make it winter", model=str(made.path), steps=2, image_guidance=g) for g in (1.0, 8.0)
    )
    assert difference(keep.pixels, free.pixels) > 0.5
