from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hires.errors import OutputError, RequestError
from hires.images.formats import check_output, read_text
from hires.images.sinks import ImageSink
from hires.images.whole import fitted, read_picture, save_png, to_uint8
from hires.tiling.geometry import Size


def test_values_beyond_the_range_are_clipped_and_rounded() -> None:
    values = np.asarray([-3.0, -1.0, -1 + 1.4 / 127.5, 0.99, 1.0, 3.0], dtype=np.float32)
    assert to_uint8(values).tolist() == [0, 0, 1, 254, 255, 255]


def test_png_round_trip_with_text(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    save_png(path, pixels, {"prompt": "ein Mond über dem See", "seed": "7"}, overwrite=False)
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert read_text(path) == {"prompt": "ein Mond über dem See", "seed": "7"}
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_what_is_in_the_way_is_said_before_any_work(tmp_path: Path) -> None:
    existing = tmp_path / "there.png"
    existing.write_bytes(b"keep me")
    for path, words in (
        (existing, "`overwrite`"),
        (tmp_path / "no" / "a.png", "does not exist"),
        (tmp_path / "a.gif", "must end in .png"),
        (tmp_path, "must end in .png"),
    ):
        with pytest.raises(OutputError, match=words):
            check_output(path, overwrite=False)
    assert check_output(existing, overwrite=True) == existing
    with pytest.raises(OutputError, match="exists already"):
        save_png(existing, np.zeros((4, 4, 3), np.uint8), {}, overwrite=False)
    assert existing.read_bytes() == b"keep me"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_refuses_leaves_nothing_and_the_old_file(tmp_path: Path) -> None:
    """A real limit on file size in a child process: writing fails half way, as on a full disk."""
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    code = """
import resource, sys, numpy as np
from pathlib import Path
from hires.errors import WriteError
from hires.images.whole import save_png
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
try:
    save_png(Path(sys.argv[1]), noise, {}, overwrite=True)
except WriteError as error:
    print(error, error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "nothing was written" in done.stdout
    assert done.stdout.strip().endswith("1")
    assert path.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_is_turned_as_its_exif_says_and_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned right by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    read = read_picture(tmp_path / "turned.png")
    assert read.shape == (30, 20, 3)
    assert read[0, -1].tolist() == [255, 255, 255]
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    assert (read_picture(Image.fromarray(clear)) == 255).all()


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_a_picture_that_pillow_does_not_know_is_read(tmp_path: Path, bands: int, kind: type) -> None:
    """Deep TIFFs, as `--bits 16` writes them: to 8 bits (Pillow cuts those of colour off), grey as colour, on white."""
    values = np.random.default_rng(0).random((20, 30, bands))
    deep = (values * (65535 if kind is np.uint16 else 1)).astype(kind)
    with ImageSink.open(tmp_path / "a.tif", Size(20, 30), bands, kind) as sink:
        sink.write(deep)
    colour, alpha = (values[..., :-1], values[..., -1:]) if bands in (2, 4) else (values, 1.0)
    expected = np.broadcast_to((colour * alpha + 1 - alpha) * 255, (20, 30, 3))
    assert np.abs(read_picture(tmp_path / "a.tif") - expected).max() < 2.6  # colour cut, alpha cut, their product rounded


@pytest.mark.parametrize("target", [Size(10, 10), Size(33, 47), Size(200, 31), Size(20, 30)])
def test_a_picture_fills_any_size(target: Size) -> None:
    source = np.full((20, 30, 3), 77, dtype=np.uint8)
    filled = fitted(source, target)
    assert filled.shape == (target.height, target.width, 3)
    assert (filled == 77).all()


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no")
    for source in (tmp_path / "no.png", tmp_path / "absent.png", np.zeros((4, 4)), np.zeros((4, 4, 3))):
        with pytest.raises(RequestError, match="give"):
            read_picture(source)  # type: ignore[arg-type]
