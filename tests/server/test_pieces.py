"""Scripts' arguments, sizes and masks of A1111, progress, the text of parameters: without a server."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hires.errors import RequestError
from hires.events import Event
from hires.images import infotext
from hires.server.a1111 import scripts
from hires.server.pictures import box_around, mask_of, resize
from hires.server.progress import Meter


def test_clarity_upscalers_arguments() -> None:
    """The sixteen that clarity-upscaler sends."""
    args = [True, "MultiDiffusion", True, True, 1, 1, 112, 144, 4, 8, "4x-UltraSharp", 2.5, False, 0, 0.0, 3]
    found = scripts.read(
        None, [], {"Tiled Diffusion": {"args": args}, "Tiled VAE": {"args": [True, 2048, 128, True, True, True, True]}}
    )
    assert (found.strategy, found.tile_px, found.overlap_px, found.upscaler, found.scale) == (
        "tiled",
        1152,
        32,
        "4x-UltraSharp",
        2.5,
    )
    assert found.keep_input and not found.enlarge


@pytest.mark.parametrize(("kind", "scale", "size"), [(0, 0.0, None), (1, 0.0, (1500, 900)), (2, 3.0, None)])
def test_ultimate_upscales_sizes(kind: int, scale: float, size: tuple[int, int] | None) -> None:
    args = [None, 640, 0, 8, 32, 64, 0.35, 32, 2, True, 1, False, 8, 0, kind, 1500, 900, 3]
    found = scripts.read("Ultimate SD upscale", args, {})
    assert (found.tile_px, found.upscaler, found.scale, found.size, found.redraw) == (640, 2, scale, size, True)
    assert not scripts.read("ultimate sd upscale", [*args[:10], 2], {}).redraw
    assert scripts.read("ultimate sd upscale", [], {}).tile_px == 512


def test_scripts_that_are_off_or_wrong() -> None:
    assert (
        scripts.read(None, [], {"Tiled Diffusion": {"args": [False]}, "ControlNet": {"args": []}, "Sampler": {"args": []}})
        == scripts.ScriptSettings()
    )
    with pytest.raises(scripts.ScriptNotFoundError, match="not found"):
        scripts.read("x/y", [], {})
    for name, args in (("ultimate sd upscale", [None, "wide"]), ("ultimate sd upscale", [None, 10**9])):
        with pytest.raises(RequestError, match="tile_width"):
            scripts.read(name, args, {})
    with pytest.raises(RequestError, match="canny"):
        scripts.read(None, [], {"controlnet": {"args": [{"module": "canny"}]}})
    with pytest.raises(RequestError, match="list"):
        scripts.read(None, [], {"Tiled VAE": {"args": 3}})


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
def test_resizing_gives_the_exact_size(width: int, height: int, to_width: int, to_height: int, mode: int) -> None:
    assert resize(Image.new("RGB", (width, height), "red"), to_width, to_height, mode).size == (to_width, to_height)


def test_filling_repeats_the_edges_colours() -> None:
    picture = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8)).resize((40, 40), Image.Resampling.NEAREST)
    filled = np.asarray(resize(picture, 120, 40, 2))
    assert (filled[:, :38] == [255, 0, 0]).all() and (filled[:, -38:] == [0, 0, 255]).all()


@given(
    st.integers(0, 39),
    st.integers(0, 29),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 12),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_the_box_around_a_mask_holds_it(x: int, y: int, w: int, h: int, padding: int, across: int, down: int) -> None:
    mask = Image.new("L", (40, 30))
    mask.paste(255, (x, y, min(40, x + w), min(30, y + h)))
    box = box_around(mask, padding, across * 64, down * 64)
    assert box is not None
    left, top, right, bottom = box
    assert 0 <= left <= x and 0 <= top <= y and min(40, x + w) <= right <= 40 and min(30, y + h) <= bottom <= 30
    assert box_around(Image.new("L", (40, 30)), padding, 64, 64) is None


def test_masks_invert_and_blur() -> None:
    mask = Image.new("L", (20, 20))
    mask.paste(255, (10, 0, 20, 20))
    assert np.asarray(mask_of(mask, (40, 40), 0, True))[:, :15].min() == 255
    blurred = np.asarray(mask_of(mask, (20, 20), 3, False))[10]
    assert 0 < blurred[9] < 255 and list(blurred) == sorted(blurred)


def test_progress_never_falls_and_ends_at_one() -> None:
    meter = Meter(2)
    seen = []
    for picture in range(2):
        meter.begin(picture)
        for done in range(17):
            preview = np.zeros((2, 2, 3), np.uint8) if done else None
            meter.hear(Event(stage="base", done=done, total=16, fraction=done / 16, eta_seconds=16.0 - done, preview=preview))
            seen.append(meter.now.fraction)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0) and 0.5 in seen
    meter.hear(Event(stage="base", done=0, total=4))
    assert meter.now.fraction == pytest.approx(1.0)
    meter.finish()
    assert meter.now.fraction == 1.0 and meter.now.eta_seconds == 0.0 and meter.now.previews == 32


def test_time_left_is_that_of_all_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("hires.server.progress.time.monotonic", lambda: now)
    meter = Meter(4)
    meter.begin(0)
    meter.hear(Event(stage="load", done=0, total=1))
    assert meter.now.eta_seconds is None, "nothing was measured"
    meter.hear(Event(stage="base", done=1, total=4, fraction=0.25, eta_seconds=30.0))
    assert meter.now.eta_seconds == pytest.approx(30 + 3 * 40), "a picture takes 40 s by what was drawn of the first"
    now = 150.0
    meter.begin(1)
    meter.hear(Event(stage="base", done=2, total=4, fraction=0.5, eta_seconds=20.0))
    assert meter.now.eta_seconds == pytest.approx(20 + 2 * 50), "the first took 50 s"
    assert meter.now.fraction == pytest.approx(1.5 / 4) and meter.now.elapsed == pytest.approx(50)
    resumed = Meter(4)
    now = 1000.0
    resumed.begin(2)
    resumed.hear(Event(stage="base", done=2, total=4, fraction=0.5, eta_seconds=20.0))
    assert resumed.now.eta_seconds == pytest.approx(20 + 40) and resumed.now.elapsed == 0, "an earlier server made two"


@given(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")),
    st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\u2028\u2029\x85")),
    st.dictionaries(
        st.sampled_from(["Steps", "Sampler", "CFG scale", "Size", "Model"]), st.text('ab,: "\\\n1x').map(str.strip)
    ),
)
def test_parameters_are_read_as_they_were_written(prompt: str, negative: str, extra: dict[str, str]) -> None:
    values = {"Seed": "5", "Version": "v", "Hash": "c"} | extra
    found = infotext.parsed(infotext.written(prompt, negative, values))
    if "Negative prompt:" not in prompt:
        assert found["Prompt"] == prompt.strip() and found["Negative prompt"] == negative.strip()
    assert {key: found[key] for key in values} == values


def test_parameters_of_a1111_itself() -> None:
    text = (
        "a castle, (detailed:1.2)\nsecond line\nNegative prompt: fog, blur\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1234, Size: 512x768, Model hash: 6ce0161689, "
        'Model: v1-5, Lora hashes: "style: 1a2b, other: 3c4d", Version: v1.10.1'
    )
    found = infotext.parsed(text)
    assert found["Prompt"] == "a castle, (detailed:1.2)\nsecond line" and found["Negative prompt"] == "fog, blur"
    assert found["Sampler"] == "DPM++ 2M" and found["Lora hashes"] == "style: 1a2b, other: 3c4d" and found["Size"] == "512x768"
    assert infotext.parsed("just a prompt: nothing else")["Prompt"] == "just a prompt: nothing else"
