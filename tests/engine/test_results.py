"""Results that one can hold: their picture, a copy of it, a line of text, and what a notebook shows."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import hires
from hires.engine.results import HeldPicture, UpscaleResult
from hires.errors import OutputError, RequestError
from hires.images.formats import read_text
from hires.images.sinks import ImageSink, srgb_profile
from hires.images.sources import ImageSource
from hires.tiling.geometry import Size

pytestmark = pytest.mark.usefixtures("warm")
PROMPT = "a sun on the right over green mountains and a lake at dusk"
SMALL: dict[str, Any] = {"size": "96x64", "steps": 2}
KINDS = [(1, np.uint8), (2, np.uint8), (3, np.uint16), (4, np.uint16), (4, np.float32)]


def picture(bands: int, kind: type, height: int = 40, width: int = 60) -> NDArray[Any]:
    values = np.random.default_rng(bands).random((height, width, bands), dtype=np.float32)
    return values if kind is np.float32 else (values * np.iinfo(kind).max).astype(kind)


def shown(result: HeldPicture) -> Image.Image:
    """The picture of a notebook's bundle."""
    bundle = result._repr_mimebundle_(include=None, exclude=None)
    assert set(bundle) == {"image/png", "text/plain"} and bundle["text/plain"] == repr(result)
    content = base64.b64decode(bundle["image/png"], validate=True)
    assert content == result._repr_png_()
    return Image.open(io.BytesIO(content))


@pytest.mark.parametrize("name", [None, "a.tif", "a.png"])
@pytest.mark.parametrize(("bands", "kind"), KINDS)
def test_an_enlargement_of_any_kind(bands: int, kind: type, name: str | None, tmp_path: Path) -> None:
    if kind is np.float32 and name == "a.png":
        pytest.skip("PNG holds no floats")
    result = hires.upscale(picture(bands, kind), scale=20, output=None if name is None else tmp_path / name)
    assert (result.pixels.shape, result.pixels.dtype) == ((800, 1200, bands), kind)
    mode = ("L", "LA", "RGB", "RGBA")[bands - 1]
    image, small = result.image, shown(result)
    assert (image.mode, image.size, small.mode, small.size) == (mode, (1200, 800), mode, (512, 341))
    white = 1 if kind is np.float32 else np.iinfo(kind).max
    exact = np.clip(result.pixels.astype(np.float64) / white, 0, 1) * 255
    assert np.abs(np.asarray(image).reshape(exact.shape) - exact).max() <= 0.51
    whole = image.resize(small.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, float) - np.asarray(whole)).mean() < 1
    where = "in memory" if name is None else str(tmp_path / name)
    assert repr(result).startswith("<hires.UpscaleResult 1200x800 from 60x40 by lanczos, ") and where in repr(result)


@pytest.mark.parametrize("name", [None, "a.tif", "a.png"])
def test_an_enlargement_is_saved_with_all_that_belongs_to_it(name: str | None, tmp_path: Path) -> None:
    profile, pixels = srgb_profile()[:-1] + b"\1", picture(4, np.uint16)
    with ImageSink.open(tmp_path / "in.png", Size(40, 60), 4, np.uint16, profile, {"prompt": "a"}) as sink:
        sink.write(pixels)
    result = hires.upscale(tmp_path / "in.png", scale=2, output=None if name is None else tmp_path / name)
    saved = result.save(tmp_path / "copy.png")
    with ImageSource.open(saved) as source:
        assert (source.size, source.bands, source.dtype, source.icc) == (Size(80, 120), 4, np.uint16, profile)
    assert np.array_equal(replace(result, path=saved, drawn=None).pixels, result.pixels)
    assert {"prompt", "hires:upscale", "Software"} <= read_text(saved).keys() and read_text(saved)["prompt"] == "a"
    assert shown(result).info["icc_profile"] == profile
    with pytest.raises(OutputError, match=r"copy\.png.*`overwrite`"):
        result.save(saved)
    assert result.save(str(saved), overwrite=True) == saved
    with pytest.raises(OutputError, match="no transparency"):
        result.save(tmp_path / "a.jpg")
    assert not (tmp_path / "a.jpg").exists()


def test_a_render_in_memory_is_saved_as_its_file_would_be(tmp_path: Path) -> None:
    kept, written = (hires.render(PROMPT, output=output, **SMALL) for output in (None, tmp_path / "a.png"))
    own, copied = kept.save(tmp_path / "kept.png"), written.save(tmp_path / "copy.png")
    assert np.array_equal(kept.pixels, written.pixels) and shown(kept).size == (96, 64)
    measured = ("hires:predictions", "hires:plan")
    texts = [{key: value for key, value in read_text(file).items() if key not in measured} for file in (own, copied)]
    assert texts[0] == texts[1] == {k: v for k, v in read_text(tmp_path / "a.png").items() if k not in measured}
    assert texts[0]["prompt"] == PROMPT and "Steps: 2" in texts[0]["parameters"]
    assert hash(kept) != hash(written) and kept == replace(kept, drawn=None), "the picture is no part of the comparison"


def test_a_picture_that_is_gone_is_told_not_raised_in_a_notebook(tmp_path: Path) -> None:
    result = hires.upscale(picture(3, np.uint8), scale=2, output=tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert result._repr_png_() is None
    assert result._repr_mimebundle_() == {"text/plain": f"{result!r}: there is no picture to show"}
    with pytest.raises(RequestError, match="is not there"):
        _ = result.image
    with pytest.raises(RequestError, match="is not there"):
        result.save(tmp_path / "b.png")
    assert list(tmp_path.iterdir()) == []


def test_the_render_of_a_refinement_has_no_picture_of_its_own() -> None:
    result = hires.upscale(picture(3, np.uint8), scale=2, refine=True, steps=2, strength=0.5)
    assert result.refined is not None and "by lanczos, refined, " in repr(result)
    assert list(result.refined._repr_mimebundle_()) == ["text/plain"] and "pixels not kept" in repr(result.refined)
    with pytest.raises(RequestError, match="of the result that this one belongs to"):
        _ = result.refined.image
    assert result.image.size == (120, 80)


def test_results_are_compared_without_their_pixels() -> None:
    first = hires.upscale(picture(3, np.uint8), scale=2)
    assert first == replace(first, drawn=np.zeros((80, 120, 3), np.uint8)) and isinstance(hash(first), int)
    assert first != replace(first, size=Size(1, 1)) and isinstance(first, UpscaleResult)
