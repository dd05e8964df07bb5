"""Renders into files: every format, 8 and 16 bits, rows in the file while the rest is decoded, nothing after an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hires
from hires.engine.output import Delivery
from hires.engine.results import RenderResult
from hires.errors import OutputError, RequestError, WriteError
from hires.events import Event
from hires.images.formats import read_text
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.tiling.geometry import Box, Size

pytestmark = pytest.mark.usefixtures("warm")

pyvips = pytest.importorskip("pyvips")
PROMPT = "a moon on the left over purple mountains and a lake at night"
SMALL: dict[str, Any] = {"size": "150x333", "steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def kept() -> RenderResult:
    return hires.render(PROMPT, **SMALL)


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_a_render_is_the_same_in_a_file_and_in_memory(tmp_path: Path, kept: RenderResult, name: str) -> None:
    result = hires.render(PROMPT, output=tmp_path / name, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (150, 333)
    difference = np.abs(result.pixels.astype(int) - kept.pixels)
    assert difference.max() == 0 if name == "a.tif" else difference.mean() < 2.5
    text = read_text(tmp_path / name)
    assert (text["prompt"], text["seed"]) == (PROMPT, "3")
    assert json.loads(text["hires:plan"])["output"] == {"height": 333, "width": 150}
    assert json.loads(text["hires:predictions"]) == json.loads(json.dumps(result.predictions()))


def test_sixteen_bits_hold_what_eight_round(tmp_path: Path, kept: RenderResult) -> None:
    deep = hires.render(PROMPT, bits=16, **SMALL).pixels
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - kept.pixels).max() <= 0.51
    assert (deep % 257 > 0).mean() > 0.5, "more than eight bits of each"
    assert np.array_equal(hires.render(PROMPT, bits=16, output=tmp_path / "a.png", **SMALL).pixels, deep)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"output": "a.jpg", "bits": 16}, OutputError, "uint8, not uint16"),
        ({"output": "a.webp", "size": "16400x16"}, OutputError, "16383"),
        ({"output": "a.gif"}, OutputError, "must end in .png"),
        ({"bits": 12}, RequestError, "bits 12"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_any_work(
    tmp_path: Path, given: dict[str, Any], kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def on_event(event: Event) -> None:
        raise AssertionError("nothing runs")

    with pytest.raises(kind, match=words):
        hires.render(PROMPT, on_event=on_event, **SMALL | given)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_in_the_sink_while_the_rest_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 64 rows: at each of them, those before are written."""
    rows: list[int] = []
    real = ImageSink.write
    monkeypatch.setattr(ImageSink, "write", lambda self, part: rows.append(len(part)) or real(self, part))  # type: ignore[func-returns-value]
    seen: list[int] = []

    def on_event(event: Event) -> None:
        if event.stage == "decode":
            seen.append(sum(rows))

    result = hires.render(
        PROMPT, size="64x700", steps=1, vram="15MB", device="cpu", output=tmp_path / "a.tif", on_event=on_event
    )
    assert result.plan.decode.policy != "whole"
    assert len(rows) > 2
    assert sum(rows) == 700
    assert 0 < seen[-1] < 700, "the last band was decoded after the first were written"


@pytest.mark.parametrize("journal", [True, False])
def test_a_disk_that_refuses_half_way_leaves_no_file_and_what_is_finished(
    tmp_path: Path, journal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ImageSink, part: object) -> None:
        raise WriteError("output a.png: No space left on device; nothing was written")

    with monkeypatch.context() as patch:
        patch.setattr(ImageSink, "write", refuse)
        with pytest.raises(WriteError, match="nothing was written"):
            hires.render(PROMPT, output=tmp_path / "a.png", **SMALL | ({} if journal else {"journal": None}))
    assert [file.name for file in tmp_path.iterdir()] == ([".a.png.hires"] if journal else [])
    parts = list((tmp_path / ".a.png.hires").glob(".*.part")) if journal else []
    assert parts == []
    if journal:
        hires.render(PROMPT, output=tmp_path / "a.png", **SMALL)
        assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_sink_that_is_opened_again_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    with Delivery(tmp_path / "a.png").open() as output:
        first = output(Size(8, 8))
        first.write(np.zeros((3, 8, 3), np.uint8))
        second = output(Size(8, 8))
        second.write(np.full((8, 8, 3), 9, np.uint8))
        assert len(list(tmp_path.iterdir())) == 1
        second.close()
    with ImageSource.open(tmp_path / "a.png") as source:
        assert source.read(Box(0, 0, 8, 8)).min() == 9
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_output_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Delivery(tmp_path / "a.png").open() as output:
            output(Size(8, 8)).write(np.zeros((3, 8, 3), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
