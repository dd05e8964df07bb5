"""The colour fix at the end of a render: the colours of what it started from, whatever decodes it and stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hires
from hires.errors import Cancelled, RequestError
from hires.events import Event
from hires.options.render import JournalOptions
from hires.refine.colour_fix import smoothed

pytestmark = pytest.mark.usefixtures("warm")

PROMPT = "a sun over a lake"
COMMON: dict[str, Any] = {"size": "328x264", "strength": 0.5, "steps": 4, "seed": 3}


def tinted() -> np.ndarray[Any, Any]:
    """A ramp in an odd colour, 264 x 328."""
    rows, cols = np.linspace(0, 1, 264)[:, None], np.linspace(0, 1, 328)
    return np.stack([200 + 0 * rows * cols, 60 + 80 * rows + 0 * cols, 40 + 60 * cols + 0 * rows], -1).astype(np.uint8)


def coarse(pixels: np.ndarray[Any, Any]) -> torch.Tensor:
    picture = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    reach = 2**5 - 1
    return smoothed(torch.nn.functional.pad(picture, (0, 0, reach, reach), mode="replicate"), 5)


def test_wavelets_bring_the_coarse_colours_back_and_leave_the_detail() -> None:
    plain, fixed = (hires.render(PROMPT, init=tinted(), colour_fix=fix, **COMMON) for fix in (None, "wavelet"))
    before, after = ((coarse(result.pixels) - coarse(tinted())).abs().mean() for result in (plain, fixed))
    assert after < 2.0 < 0.5 * before
    fine = [result.pixels.astype(float) - coarse(result.pixels)[0].permute(1, 2, 0).numpy() for result in (plain, fixed)]
    inside = (slice(40, 220), slice(40, 290))
    assert np.corrcoef(fine[0][inside].ravel(), fine[1][inside].ravel())[0, 1] > 0.95
    assert any("colour fix wavelet: coarse colours of the picture it starts from" in note for note in fixed.plan.notes)


def test_adain_brings_mean_and_deviation_back() -> None:
    fixed = hires.render(PROMPT, init=tinted(), colour_fix="adain", **COMMON)
    for channel in range(3):
        found, wanted = fixed.pixels[..., channel].astype(float), tinted()[..., channel].astype(float)
        assert abs(found.mean() - wanted.mean()) < 3 and abs(found.std() - wanted.std()) < 3
    plain = hires.plan(PROMPT, size="328x264")
    twice = hires.plan(PROMPT, size="328x264", colour_fix="adain")
    assert twice.costs[-2].flops == 2 * plain.costs[-2].flops


@pytest.mark.slow
def test_any_bands_give_the_same_and_a_base_picture_lends_its_colours() -> None:
    """Two stages from noise; decoded whole, and in bands under a small budget."""
    options: dict[str, Any] = {"size": "400x272", "steps": 3, "colour_fix": "wavelet"}
    whole, bands = (hires.render(PROMPT, vram=vram, **options) for vram in (None, "60MB"))
    assert (whole.plan.decode.policy, bands.plan.decode.policy != "whole") == ("whole", True)
    assert np.abs(whole.pixels.astype(int) - bands.pixels.astype(int)).max() <= 1
    assert any("of its base picture" in note for note in whole.plan.notes)
    assert not np.array_equal(whole.pixels, hires.render(PROMPT, **options | {"colour_fix": None}).pixels)


@pytest.mark.slow
def test_a_stopped_render_goes_on_to_the_same_picture(tmp_path: Path) -> None:
    options: dict[str, Any] = {"size": "400x272", "steps": 3, "colour_fix": "wavelet", "vram": "60MB"}
    expected = hires.render(PROMPT, **options).pixels

    def stop(event: Event) -> None:
        if event.stage == "decode" and event.done * 2 > event.total:
            raise Cancelled("stopped")

    kept = JournalOptions(seconds=0)
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=tmp_path / "a.png", journal=kept, on_event=stop, **options)
    found = hires.render(PROMPT, output=tmp_path / "a.png", journal=JournalOptions(resume=True), **options)
    assert np.array_equal(found.pixels, expected)


def test_where_there_is_no_picture_to_take_colours_from_the_plan_says_so() -> None:
    assert any("changes nothing" in note for note in hires.plan(size="256x256", colour_fix="wavelet").notes)
    with pytest.raises(RequestError, match="did you mean 'wavelet'"):
        hires.plan(size="256x256", colour_fix="wavelets")
