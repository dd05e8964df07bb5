"""Pictures read box by box: the same as Pillow or tifffile read whole, in any order, turned as EXIF says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hires.errors import RequestError
from hires.images import sources
from hires.images.sinks import ImageSink, srgb_profile
from hires.images.sources import ImageSource, RowPicture, TilePicture
from hires.tiling.geometry import Box, Size

pyvips = pytest.importorskip("pyvips")
tifffile = pytest.importorskip("tifffile")
HEIGHT, WIDTH = 211, 157
BOXES = (
    Box(0, 0, 211, 157),
    Box(200, 3, 11, 100),
    Box(7, 150, 30, 7),
    Box(100, 0, 1, 157),
    Box(0, 0, 1, 1),
    Box(210, 156, 1, 1),
)


def pixels_of(bands: int = 3, kind: type = np.uint8) -> NDArray[Any]:
    values = np.random.default_rng(1).random((HEIGHT, WIDTH, bands), dtype=np.float32)
    return values if kind is np.float32 else (values * np.iinfo(kind).max).astype(kind)


def check(source: ImageSource, expected: NDArray[Any]) -> None:
    """Every box, down and up again."""
    assert source.size == Size(*expected.shape[:2])
    assert (source.bands, source.dtype) == (expected.shape[2], expected.dtype)
    for box in (*BOXES, *reversed(BOXES)):
        if box.bottom <= source.size.height and box.right <= source.size.width:
            assert np.array_equal(source.read(box), expected[box.rows, box.cols]), box


def pillow(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        array = np.asarray(picture)
    return array if array.ndim == 3 else array[..., None]


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "STRIP_BYTES", 5000)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.ppm", "a.gif"])
def test_colour_files_are_read_as_pillow_reads_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    Image.fromarray(pixels_of()).save(path, **({"lossless": True} if name.endswith("webp") else {}))
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    with ImageSource.open(path) as source:
        if name.endswith("jpg"):  # another decoder may round otherwise
            whole = source.read(Box(0, 0, HEIGHT, WIDTH))
            assert np.abs(whole.astype(int) - expected).max() <= 3
            expected = whole
        check(source, expected)
        assert isinstance(source, RowPicture) == (path.suffix not in (".bmp", ".ppm"))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_modes_become_bands(tmp_path: Path, mode: str) -> None:
    Image.fromarray(pixels_of(4)).convert("RGBA" if mode == "RGBA" else "RGB").convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        expected = np.asarray(picture.convert({"P": "RGB", "1": "L"}.get(mode, mode)))
    with ImageSource.open(tmp_path / "a.png") as source:
        check(source, expected if expected.ndim == 3 else expected[..., None])
        assert source.has_alpha == (mode in ("LA", "RGBA"))


@pytest.mark.parametrize(("suffix", "kind"), [(".png", np.uint16), (".tif", np.uint16), (".tif", np.float32)])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_sixteen_bits_and_floats_are_read_as_they_were_written(tmp_path: Path, suffix: str, kind: type, bands: int) -> None:
    pixels = pixels_of(bands, kind)
    with ImageSink.open(tmp_path / f"a{suffix}", Size(HEIGHT, WIDTH), bands, kind) as sink:
        sink.write(pixels)
    with ImageSource.open(tmp_path / f"a{suffix}") as source:
        check(source, pixels)
        assert isinstance(source, TilePicture) == (suffix == ".tif")


@pytest.mark.parametrize("options", [{}, {"tile": (64, 64)}, {"rowsperstrip": 5, "compression": "zlib"}, {"bigtiff": True}])
def test_tiffs_of_others(tmp_path: Path, options: dict[str, Any]) -> None:
    pixels = pixels_of(3, np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **options)
    with ImageSource.open(tmp_path / "a.tif") as source:
        check(source, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("in_memory", [True, False])
def test_exif_turns_the_picture_as_pillow_does(
    tmp_path: Path, orientation: int, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    picture = Image.fromarray(pixels_of())
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    with ImageSource.open(tmp_path / "a.png") as source:
        check(source, expected)
    check(ImageSource.open(Image.open(tmp_path / "a.png")), expected)


def test_a_turned_picture_leaves_no_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    picture = Image.fromarray(pixels_of())
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    with ImageSource.open(tmp_path / "a.jpg") as source:
        assert list((tmp_path / "scratch").iterdir())
        source.read(Box(0, 0, 5, 5))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_going_down_decodes_once_and_up_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is opened again only for a row above what is kept; rows above the last box's top are let go."""
    opened = []
    real = sources._loaded
    monkeypatch.setattr(sources, "_loaded", lambda path, access: opened.append(access) or real(path, access))  # type: ignore[func-returns-value]
    Image.fromarray(pixels_of()).save(tmp_path / "a.png")
    source = ImageSource.open(tmp_path / "a.png")
    for top in range(0, 180, 20):
        source.read(Box(top, 0, 31, WIDTH))
    assert len(opened) == 1
    assert isinstance(source, RowPicture)
    assert sum(len(strip) for strip in source._strips) <= 31 + 2 * source._strip
    assert np.array_equal(source.read(Box(0, 0, 3, 5)), pixels_of()[:3, :5])
    assert len(opened) == 2


def test_a_file_that_is_overwritten_is_read_anew(tmp_path: Path) -> None:
    for value in (10, 20):
        Image.fromarray(np.full((20, 30, 3), value, np.uint8)).save(tmp_path / "a.png")
        assert ImageSource.open(tmp_path / "a.png").read(Box(0, 0, 1, 1)).max() == value


def test_profiles_are_kept_and_cmyk_becomes_srgb(tmp_path: Path) -> None:
    profile = srgb_profile()
    Image.fromarray(pixels_of()).save(tmp_path / "a.png", icc_profile=profile)
    assert ImageSource.open(tmp_path / "a.png").icc == profile
    Image.new("CMYK", (40, 30), (0, 0, 0, 0)).save(tmp_path / "b.jpg")
    source = ImageSource.open(tmp_path / "b.jpg")
    assert (source.bands, source.icc) == (3, None)
    assert source.read(Box(0, 0, 30, 40)).min() >= 250, "no ink is white"


def test_arrays_and_pictures_are_sources() -> None:
    check(ImageSource.open(pixels_of(2)), pixels_of(2))
    check(ImageSource.open(pixels_of(1)[..., 0]), pixels_of(1))
    check(ImageSource.open(pixels_of(3, np.float32).astype(np.float64)), pixels_of(3, np.float32))
    check(ImageSource.open(Image.fromarray(pixels_of(4))), pixels_of(4))
    sixteen = pixels_of(1, np.uint16)
    check(ImageSource.open(Image.fromarray(sixteen[..., 0])), sixteen)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(pixels_of()).save(tmp_path / "whole.jpg")
    cut = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(cut[: len(cut) // 2])
    for made in (np.zeros((4, 4, 5)), np.zeros(4), np.zeros((0, 4, 3)), np.zeros((4, 4, 3), np.int32)):
        with pytest.raises(RequestError, match="give"):
            ImageSource.open(made)
    for name in ("no.png", "empty.jpg", "absent.png", "."):
        with pytest.raises(RequestError, match="give a picture file"):
            ImageSource.open(tmp_path / name)
    with pytest.raises(RequestError, match=r"cut\.jpg"), ImageSource.open(tmp_path / "cut.jpg") as source:
        source.read(Box(0, 0, HEIGHT, WIDTH))
