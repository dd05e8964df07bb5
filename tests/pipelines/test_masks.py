"""Redrawing within a mask: the rest of the picture stays to the byte, and what is drawn fits it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hires
from hires.checkpoints.spec import load_spec
from hires.errors import RequestError
from hires.models.previews import mapped
from hires.pipelines.progressive import cell_mask
from hires.tiling.geometry import Size

pytestmark = pytest.mark.usefixtures("warm")

SIZE = (150, 102)  # neither a multiple of 8
OPTIONS = {"size": "150x102", "steps": 4, "seed": 6, "vram": "2GB"}


@pytest.fixture(scope="module")
def given() -> np.ndarray:
    return hires.render("a lake at dusk", **OPTIONS).pixels


def mask_of(soft: bool) -> np.ndarray:
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[30:80, 61:133] = 255
    if soft:
        mask[30:80, 51:61] = np.arange(1, 11) * 20
    return mask


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("fix", [None, "wavelet"])
def test_what_the_mask_leaves_out_stays(given: np.ndarray, soft: bool, fix: str | None) -> None:
    mask = mask_of(soft)
    drawn = hires.render(
        "a sun", init=given, mask=Image.fromarray(mask), strength=1.0, colour_fix=fix, **(OPTIONS | {"seed": 9})
    ).pixels
    assert np.array_equal(drawn[mask == 0], given[mask == 0])
    assert (drawn[mask == 255] != given[mask == 255]).mean() > 0.5


def test_an_all_white_mask_is_no_mask_and_a_black_one_the_picture(given: np.ndarray) -> None:
    plain = hires.render("a sun", init=given, strength=0.6, **OPTIONS).pixels
    white = hires.render("a sun", init=given, mask=np.full((102, 150, 3), 255, np.uint8), strength=0.6, **OPTIONS).pixels
    black = hires.render("a sun", init=given, mask=np.zeros((102, 150, 3), np.uint8), strength=0.6, **OPTIONS).pixels
    assert np.array_equal(white, plain) and np.array_equal(black, given)


def test_the_model_sees_the_rest(given: np.ndarray) -> None:
    """What is drawn within the mask depends on what lies around it, as the same noise over another picture shows."""
    mask = Image.fromarray(mask_of(soft=False))
    ones = hires.render("a lake", init=given, mask=mask, strength=1.0, **OPTIONS).pixels
    others = hires.render("a lake", init=255 - given, mask=mask, strength=1.0, **OPTIONS).pixels
    inside = mask_of(soft=False) == 255
    assert np.abs(ones[inside].astype(int) - others[inside]).mean() > 3


def test_cells_take_the_share_of_the_mask() -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 12:] = 255
    shares = cell_mask(mask, Size(4, 6))
    assert shares.shape == (1, 1, 4, 6)
    assert torch.equal(shares[0, 0, 0], torch.tensor([0, 0.5, 1, 1, 1, 1]))


def test_a_mask_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="with `init`"):
        hires.render("a lake", mask=np.zeros((8, 8, 3), np.uint8), size="64x64")
    command = [
        sys.executable,
        "-m",
        "hires",
        "render",
        "a",
        "-o",
        str(tmp_path / "a.png"),
        "--size",
        "64x64",
        "--mask",
        "m.png",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and "--init" in ended.stderr and "Traceback" not in ended.stderr


def test_a_preview_without_a_decoder_shows_the_picture() -> None:
    """The linear map of the last estimate beside the finished picture."""
    events = []
    result = hires.render(
        "a sun on the right over green mountains", size="256x256", steps=6, seed=2, vram="2GB", on_event=events.append
    )
    shown = [event.preview for event in events if event.preview is not None]
    assert len(shown) == 6
    last = np.asarray(Image.fromarray(shown[-1]).resize((32, 32), Image.Resampling.BOX), dtype=float)
    real = np.asarray(Image.fromarray(result.pixels).resize((32, 32), Image.Resampling.BOX), dtype=float)
    assert np.corrcoef(last.ravel(), real.ravel())[0, 1] > 0.9
    assert np.abs(last - real).mean() < 20


def test_no_preview_where_there_is_no_map() -> None:
    assert mapped(torch.zeros(1, 16, 4, 4), load_spec("demo")) is None
