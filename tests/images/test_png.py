"""The PNG writer against three readers; the filters against the specification, one byte at a time."""

from __future__ import annotations

import io
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hires.images import png
from hires.images.png import PngWriter, chunks, filtered, read_png_text
from hires.tiling.geometry import Size

pyvips = pytest.importorskip("pyvips")
BANDS_MODE = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def noisy(height: int, width: int, bands: int, kind: type = np.uint8, seed: int = 0) -> NDArray[np.generic]:
    """A slope with noise, so that every filter has its rows."""
    rng = np.random.default_rng(seed)
    most = np.iinfo(kind).max
    slope = np.linspace(0, most * 0.7, width)[None, :, None] + rng.normal(0, most / 40, (height, width, bands))
    slope[height // 2 :] = rng.uniform(0, most, (height - height // 2, width, bands))
    return np.clip(slope, 0, most).astype(kind)


def written(pixels: NDArray[np.generic], cuts: list[int] | None = None, icc: bytes | None = None) -> bytes:
    file = io.BytesIO()
    writer = PngWriter(file, Size(*pixels.shape[:2]), pixels.shape[2], pixels.dtype, icc)
    edges = [0, *(cuts or []), len(pixels)]
    for top, bottom in itertools.pairwise(edges):
        writer.write(pixels[top:bottom])
    writer.finish({})
    return file.getvalue()


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_what_is_written_is_read_by_libvips(bands: int, kind: type) -> None:
    pixels = noisy(61, 47, bands, kind)
    read = pyvips.Image.new_from_buffer(written(pixels, [1, 30, 30]), "").numpy().reshape(pixels.shape)
    assert read.dtype == kind
    assert np.array_equal(read, pixels)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_eight_bits_are_read_by_pillow(bands: int) -> None:
    pixels = noisy(37, 129, bands)
    with Image.open(io.BytesIO(written(pixels))) as picture:
        assert picture.mode == BANDS_MODE[bands]
        assert np.array_equal(np.asarray(picture).reshape(pixels.shape), pixels)


def test_the_bytes_do_not_depend_on_how_rows_come_nor_on_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "BLOCK_BYTES", 4000)  # several blocks, which do not divide the height
    pixels = noisy(101, 83, 3)
    whole = written(pixels)
    assert written(pixels, list(range(1, 101))) == whole
    assert written(pixels, [64]) == whole
    monkeypatch.setattr(png, "MOST_WORKERS", 1)
    assert written(pixels) == whole
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(whole))), pixels)


def unfiltered(lines: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """The specification's reconstruction, byte by byte."""
    rows = np.zeros((len(lines), lines.shape[1] - 1), dtype=np.uint8)
    for y, line in enumerate(lines):
        for x, value in enumerate(line[1:]):
            left = int(rows[y, x - step]) if x >= step else 0
            up = int(rows[y - 1, x]) if y else 0
            rows[y, x] = (int(value) + {1: left, 2: up, 3: (left + up) // 2}[int(line[0])]) % 256
    return rows


@given(
    st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 6, 8]), st.randoms(use_true_random=False)
)  # fmt: skip
def test_filters_are_undone_by_the_specification(height: int, width: int, step: int, random: object) -> None:
    rows = np.random.default_rng(random.randint(0, 2**31)).integers(0, 256, (height, width * step), dtype=np.uint8)  # type: ignore[attr-defined]
    assert np.array_equal(unfiltered(filtered(rows, np.zeros(width * step, np.uint8), step), step), rows)


def test_a_photograph_takes_no_more_than_pillows() -> None:
    """Within 10 % of Pillow's file at the same zlib level, on texture that filters matter for."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(np.cumsum(rng.normal(0, 1, (256, 384, 3)), axis=0), axis=1)
    pixels = (
        ((walk - walk.min()) / (walk.max() - walk.min()) * 255 + rng.normal(0, 2, walk.shape)).clip(0, 255).astype(np.uint8)
    )
    theirs = io.BytesIO()
    Image.fromarray(pixels).save(theirs, "PNG", compress_level=png.LEVEL)
    assert len(written(pixels)) <= 1.1 * theirs.tell()


def test_colour_is_said_srgb_or_by_the_profile() -> None:
    plain = written(noisy(3, 4, 3))
    assert [kind for kind, _ in chunks(io.BytesIO(plain))][:4] == [b"IHDR", b"sRGB", b"gAMA", b"cHRM"]
    profile = bytes(range(256)) * 9
    with Image.open(io.BytesIO(written(noisy(3, 4, 3), icc=profile))) as picture:
        assert picture.info["icc_profile"] == profile
        assert "srgb" not in picture.info


def test_text_before_and_after_the_pixels_is_read_without_them(tmp_path: Path) -> None:
    """As Pillow reads it, and with text that Pillow wrote compressed."""
    path, pixels = tmp_path / "a.png", noisy(20, 30, 3)
    with path.open("wb") as file:
        writer = PngWriter(file, Size(20, 30), 3, pixels.dtype)
        writer.text({"seed": "7", "prompt": "ein Mond über dem See"})
        writer.write(pixels)
        writer.finish({"plan": "x" * 5000})
    with Image.open(path) as picture:
        picture.load()
        assert picture.text == {"seed": "7", "prompt": "ein Mond über dem See", "plan": "x" * 5000}
    assert read_png_text(path) == {"seed": "7", "prompt": "ein Mond über dem See", "plan": "x" * 5000}
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("a", "zip " * 99, zip=True)
    info.add_itxt("b", "zíp " * 99, zip=True)
    Image.fromarray(pixels).save(path, pnginfo=info)
    assert read_png_text(path) == {"a": "zip " * 99, "b": "zíp " * 99}


def test_a_packed_text_that_unpacks_to_more_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "LONGEST_TEXT", 10_000)
    path = tmp_path / "bomb.png"
    path.write_bytes(png.SIGNATURE + png.chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b" * 10**6)))
    assert len(read_png_text(path)["a"]) <= 10_000


def test_what_is_no_png_is_said(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match="no PNG"):
        read_png_text(tmp_path / "no.png")
