"""Pictures written by rows: read back by other libraries, exact, whole or not there; limits are said beforehand."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from hires.errors import OutputError, RequestError, WriteError
from hires.images.atomic_file import Unfinished
from hires.images.formats import check_fits, check_output, read_text
from hires.images.sinks import ArraySink, ImageSink, srgb_profile
from hires.images.tiff import halved, pyramid
from hires.tiling.geometry import Size

pyvips = pytest.importorskip("pyvips")
tifffile = pytest.importorskip("tifffile")
ODD = Size(301, 517)


def random_pixels(size: Size, bands: int, kind: type, seed: int = 0) -> NDArray[Any]:
    values = np.random.default_rng(seed).random((size.height, size.width, bands), dtype=np.float32)
    return values if kind is np.float32 else (values * (np.iinfo(kind).max + 0.99)).astype(kind)


def write(path: Path, pixels: NDArray[Any], rows: int = 50, **given: Any) -> Path:
    with ImageSink.open(path, Size(*pixels.shape[:2]), pixels.shape[2], pixels.dtype, **given) as sink:
        for top in range(0, len(pixels), rows):
            sink.write(pixels[top : top + rows])
    return path


def by_vips(path: Path) -> NDArray[Any]:
    image = pyvips.Image.new_from_file(str(path), revalidate=True)
    pixels: NDArray[Any] = image.numpy()
    return pixels.reshape(image.height, image.width, image.bands)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_tiff_is_exact_in_tifffile_and_libvips(tmp_path: Path, bands: int, kind: type) -> None:
    pixels = random_pixels(ODD, bands, kind)
    path = write(tmp_path / "a.tif", pixels)
    assert np.array_equal(tifffile.imread(path).reshape(pixels.shape), pixels)
    assert np.array_equal(by_vips(path), pixels)
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff
        assert file.pages[0].is_tiled
        assert [level.shape[:2] for level in file.series[0].levels] == [(301, 517), (151, 259)]
        assert bool(file.pages[0].extrasamples) == (bands in (2, 4))


def test_eight_bit_files_are_the_same_in_pillow_tifffile_and_libvips(tmp_path: Path) -> None:
    pixels = random_pixels(ODD, 3, np.uint8)
    for name in ("a.png", "a.tif"):
        path = write(tmp_path / name, pixels)
        with Image.open(path) as picture:
            assert np.array_equal(np.asarray(picture), pixels)
        assert np.array_equal(by_vips(path), pixels)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), pixels)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
@pytest.mark.parametrize("bands", [1, 3])
def test_lossy_files_are_close(tmp_path: Path, name: str, bands: int) -> None:
    rows, cols = np.mgrid[:83, :131]
    pixels = np.stack([127 + 90 * np.sin(rows / 9 + cols / (11 + band)) for band in range(bands)], axis=-1).astype(np.uint8)
    path = write(tmp_path / name, pixels)
    read = by_vips(path)
    assert read.shape[:2] == (83, 131)
    assert np.abs(read[..., :bands].astype(int) - pixels).mean() < 2.5
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_webp_keeps_transparency(tmp_path: Path) -> None:
    pixels = np.full((40, 60, 4), 200, dtype=np.uint8)
    pixels[:, :30, 3] = 0
    assert np.array_equal(by_vips(write(tmp_path / "a.webp", pixels))[..., 3], pixels[..., 3])


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(1, 12), max_size=8), st.sampled_from([".png", ".tif"]))
@settings(max_examples=25, deadline=None)
def test_any_size_in_any_bands(height: int, width: int, cuts: list[int], suffix: str) -> None:
    import tempfile

    pixels = random_pixels(Size(height, width), 3, np.uint16, seed=height * 41 + width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        with ImageSink.open(path, Size(height, width), 3, np.uint16) as sink:
            top = 0
            for rows in [*cuts, height]:
                sink.write(pixels[top : top + rows])
                top = min(height, top + rows)
        assert np.array_equal(by_vips(path), pixels)


def test_each_level_of_the_pyramid_is_the_mean_of_the_one_above(tmp_path: Path) -> None:
    pixels = random_pixels(Size(1101, 1203), 3, np.uint8)
    path = write(tmp_path / "a.tif", pixels, rows=97)
    with tifffile.TiffFile(path) as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape[:2] for level in levels[1:]] == [(s.height, s.width) for s in pyramid(Size(1101, 1203))]
    for above, level in itertools.pairwise(levels):
        even = np.pad(above, ((0, above.shape[0] % 2), (0, above.shape[1] % 2), (0, 0)), mode="edge").astype(float)
        mean = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
        assert np.array_equal(level, np.floor(mean + 0.5))
    assert halved(np.full((2, 3, 1), 65535, np.uint16)).max() == 65535


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_text_is_read_back_and_the_profile_kept(tmp_path: Path, name: str) -> None:
    text = {"prompt": "ein Mond über dem See", "seed": "7"}
    pixels, profile = random_pixels(Size(20, 30), 3, np.uint8), srgb_profile()
    with ImageSink.open(tmp_path / name, Size(20, 30), icc=profile, metadata=text) as sink:
        sink.write(pixels)
        sink.close({"hires:plan": "{}"})
    assert read_text(tmp_path / name) == text | {"hires:plan": "{}"}
    image = pyvips.Image.new_from_file(str(tmp_path / name), revalidate=True)
    assert image.get("icc-profile-data") == profile
    with Image.open(tmp_path / name) as picture:
        assert picture.info["icc_profile"] == profile


def test_what_has_no_room_in_a_jpeg_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jpg", random_pixels(Size(20, 30), 3, np.uint8), metadata={"seed": "7", "plan": "x" * 70_000})
    assert read_text(path) == {"seed": "7"}
    assert "plan has no room" in caplog.text


def test_the_same_picture_is_the_same_file_at_any_time(tmp_path: Path) -> None:
    import time

    names, pixels = ("a.png", "a.tif", "a.jpg", "a.webp"), random_pixels(ODD, 3, np.uint8)
    first = [write(tmp_path / name, pixels, metadata={"seed": "7"}).read_bytes() for name in names]
    time.sleep(1.01)
    assert first == [write(tmp_path / name, pixels, 7, metadata={"seed": "7"}, overwrite=True).read_bytes() for name in names]


def test_colour_without_a_profile_is_tagged_srgb(tmp_path: Path) -> None:
    from PIL import ImageCms

    for name in ("a.tif", "a.jpg", "a.webp"):
        path = write(tmp_path / name, random_pixels(Size(20, 30), 3, np.uint8))
        with Image.open(path) as picture:
            import io

            assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"])))


@pytest.mark.parametrize(
    ("name", "size", "bands", "kind", "words"),
    [
        ("a.jpg", Size(65536, 8), 3, np.uint8, "65535"),
        ("a.webp", Size(8, 16384), 3, np.uint8, "16383"),
        ("a.jpg", Size(8, 8), 4, np.uint8, "no transparency"),
        ("a.jpg", Size(8, 8), 3, np.uint16, "uint8, not uint16"),
        ("a.png", Size(8, 8), 3, np.float32, "uint8 or uint16, not float32"),
        ("a.gif", Size(8, 8), 3, np.uint8, "must end in .png"),
    ],
)
def test_limits_are_said_beforehand(tmp_path: Path, name: str, size: Size, bands: int, kind: type, words: str) -> None:
    with pytest.raises(OutputError, match=words):
        check_fits(tmp_path / name, size, bands, kind)
    with pytest.raises(OutputError, match=words):
        ImageSink.open(tmp_path / name, size, bands, kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_an_error_on_the_way_leaves_nothing_and_the_old_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")

    def fail() -> None:
        with ImageSink.open(path, Size(900, 700), overwrite=True) as sink:
            sink.write(np.zeros((600, 700, 3), np.uint8))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_a_disk_that_refuses_is_a_write_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A real limit on file size in a child process: writing fails half way, as on a full disk."""
    code = """
import resource, sys, numpy as np
from pathlib import Path
from hires.errors import WriteError
from hires.images.sinks import ImageSink
from hires.tiling.geometry import Size
resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
noise = np.random.default_rng(0).integers(0, 256, (700, 600, 3), dtype=np.uint8)
try:
    with ImageSink.open(Path(sys.argv[1]), Size(700, 600)) as sink:
        for top in range(0, 700, 70):
            sink.write(noise[top : top + 70])
except WriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, timeout=60)
    assert "nothing was written" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    sink = ImageSink.open(path, Size(4, 4))
    sink.write(np.zeros((4, 4, 3), np.uint8))
    path.write_bytes(b"another")
    with pytest.raises(OutputError, match="appeared while rendering"):
        sink.close()
    assert path.read_bytes() == b"another"
    assert len(list(tmp_path.iterdir())) == 1


def test_rows_that_do_not_fit_and_rows_that_lack(tmp_path: Path) -> None:
    sink = ImageSink.open(tmp_path / "a.png", Size(10, 7))
    for rows in (np.zeros((4, 8, 3), np.uint8), np.zeros((4, 7, 3), np.uint16), np.zeros((11, 7, 3), np.uint8)):
        with pytest.raises(ValueError, match="the picture is 7x10"):
            sink.write(rows)
    sink.write(np.zeros((9, 7, 3), np.uint8))
    with pytest.raises(AssertionError, match="9 of 10 rows"):
        sink.close()
    sink.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_canvas_is_cut_to_the_picture() -> None:
    sink = ArraySink(Size(10, 7))
    for value in (1, 2, 3):
        sink.put(np.full((4, 16, 3), value, dtype=np.uint8))
    sink.close()
    assert sink.pixels[[0, 4, 8, 9], 0, 0].tolist() == [1, 2, 3, 3]
    given = np.zeros((10, 7, 1), dtype=np.float32)
    assert ArraySink(Size(10, 7), 1, pixels=given).pixels is given
    with pytest.raises(RequestError, match="give one of that shape"):
        ArraySink(Size(10, 7), 3, pixels=given)


def test_tiff_is_written_without_more_codecs(tmp_path: Path) -> None:
    """tifffile alone, as it comes: imagecodecs is not asked for."""
    code = """
import sys
sys.modules["imagecodecs"] = None
import numpy as np
from hires.images.sinks import ImageSink
from hires.tiling.geometry import Size
for kind in ("uint8", "uint16", "float32"):
    pixels = (np.random.default_rng(0).random((600, 301, 3)) * 200).astype(kind)
    with ImageSink.open(sys.argv[1] + f"/{kind}.tif", Size(600, 301), 3, kind) as sink:
        sink.write(pixels)
    import tifffile
    assert np.array_equal(tifffile.imread(sys.argv[1] + f"/{kind}.tif"), pixels)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert by_vips(tmp_path / "uint16.tif").shape == (600, 301, 3)


def test_the_place_is_checked(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        check_output(tmp_path / "no" / "a.tif", overwrite=False)
    with pytest.raises(WriteError, match="nothing was written"):
        Unfinished(tmp_path / "no" / "a.tif", overwrite=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_refuses_again_and_again_is_one_error(tmp_path: Path) -> None:
    sink = ImageSink.open(tmp_path / "a.png", Size(64, 64))
    encoder: Any = sink._encoder
    with contextlib.suppress(OSError), Path("/dev/full").open("wb") as full:
        full.write(b"waits in the buffer")
        encoder.file = encoder.writer.file = full
        sink.abort()
        assert full.closed
    assert not [*tmp_path.iterdir()]


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_else(tmp_path: Path) -> None:
    path, pixels = tmp_path / "a.png", random_pixels(Size(8, 8), 3, np.uint8)
    script = f"""
import os
from pathlib import Path
from hires.images.atomic_file import Unfinished
print(Unfinished(Path({str(path)!r}), False).temporary.name, flush=True)
os.kill(os.getpid(), 9)
"""
    left = tmp_path / subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()
    other, alive = tmp_path / ".b.png.abcdefgh.part", Unfinished(path, overwrite=False)
    other.touch()
    for file in (left, other, alive.temporary):
        os.utime(file, (0, 0))
    write(path, pixels)
    assert sorted(tmp_path.iterdir()) == sorted([path, other, alive.temporary])
    alive.discard()


@pytest.mark.parametrize(("bytes_", "fits"), [(240, True), (241, False), (255, False)])
def test_a_name_leaves_room_for_what_is_unfinished(bytes_: int, fits: bool, tmp_path: Path) -> None:
    path = tmp_path / ("é" * 100 + "n" * (bytes_ - 204) + ".png")
    if fits:
        assert check_output(path, overwrite=False) == write(path, random_pixels(Size(8, 8), 3, np.uint8))
    else:
        with pytest.raises(OutputError, match=f"a name of {bytes_} bytes; give one of at most 240"):
            check_output(path, overwrite=False)
