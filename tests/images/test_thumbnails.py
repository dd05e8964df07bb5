"""Thumbnails: what Pillow makes of the whole picture, read in bands, of any planes and types."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hires.images.sinks import ImageSink, srgb_profile
from hires.images.sources import STRIP_BYTES, ArrayPicture, ImageSource
from hires.images.thumbnails import eight_bits, thumbnail, to_pillow
from hires.tiling.geometry import Box, Size
from tests.support.pictures import textured

KINDS: dict[str, Any] = {"uint8": 255, "uint16": 65535, "float32": 1}


def picture(height: int, width: int, planes: int, kind: str = "uint8") -> NDArray[Any]:
    values = np.stack([textured(height, width, plane) for plane in range(planes)], axis=-1)
    scaled = np.clip(values, 0, 1) * KINDS[kind]
    return (scaled if kind == "float32" else np.rint(scaled)).astype(kind)


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_pillow_makes_of_the_whole(planes: int, kind: str) -> None:
    pixels = picture(301, 450, planes, kind)
    small = thumbnail(ArrayPicture(pixels), 60)
    expected = to_pillow(pixels)
    expected.thumbnail((60, 60), Image.Resampling.LANCZOS)
    assert small.mode == expected.mode == ("L", "LA", "RGB", "RGBA")[planes - 1] and small.size == (60, 40)
    apart = np.abs(np.asarray(small).astype(int) - np.asarray(expected))
    assert apart.max() <= 6 and apart.mean() < 0.5, "rounded twice, and with alpha multiplied in and out again"


@pytest.mark.parametrize(("size", "longest", "expected"), [
    (Size(40, 30), 60, (30, 40)), (Size(1000, 3), 100, (1, 100)), (Size(3, 1000), 100, (100, 1)), (Size(1, 1), 8, (1, 1)),
    (Size(257, 511), 64, (64, 32)),
])  # fmt: skip
def test_sizes(size: Size, longest: int, expected: tuple[int, int]) -> None:
    """Small pictures stay as they are; the thinnest keeps a pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (size.height, size.width, 3), dtype=np.uint8)
    small = thumbnail(ArrayPicture(pixels), longest)
    assert small.size == expected
    if max(size.height, size.width) <= longest:
        assert np.array_equal(np.asarray(small), pixels)


def test_sixteen_bits_are_rounded_to_eight() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(eight_bits(every), np.rint(every / 257).astype(np.uint8))
    assert eight_bits(np.array([-1, 0, 0.5, 1, 2], np.float32)).tolist() == [0, 0, 128, 255, 255]


def test_no_more_than_a_strip_is_read_at_once_and_each_row_once() -> None:
    class Watched(ImageSource):
        boxes: list[Box] = []  # noqa: RUF012

        def read(self, box: Box) -> NDArray[np.uint8]:
            self.boxes.append(box)
            return np.full((box.height, box.width, 3), 200, np.uint8)

    source = Watched(Size(5000, 4000), 3, np.dtype(np.uint8), None, "watched")
    assert set(np.asarray(thumbnail(source, 512)).flat) == {200}
    assert max(box.height * box.width * 3 for box in source.boxes) <= STRIP_BYTES
    assert [box.top for box in source.boxes[1:]] == [box.bottom for box in source.boxes[:-1]]
    assert source.boxes[-1].bottom == 5000


def test_the_profile_goes_along(tmp_path: Path) -> None:
    pixels = picture(90, 60, 3)
    with ImageSink.open(tmp_path / "a.png", Size(90, 60), icc=srgb_profile()) as sink:
        sink.write(pixels)
    with ImageSource.open(tmp_path / "a.png") as source:
        small = thumbnail(source, 30)
    stream = io.BytesIO()
    small.save(stream, "PNG")
    assert Image.open(stream).info["icc_profile"] == srgb_profile()


CHILD = """
import sys, numpy, PIL.Image, pyvips
from hires.images.sources import ImageSource
from hires.images.thumbnails import thumbnail
def held(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))
before = held("VmRSS")
with ImageSource.open(sys.argv[1]) as source:
    thumbnail(source, 512)
print(held("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_picture_of_8192_a_side_takes_half_of_its_own_bytes(tmp_path: Path) -> None:
    """201 MB as pixels, 600 MB where it is read whole; in a process of its own, whose peak memory is its own."""
    with ImageSink.open(tmp_path / "a.png", Size(8192, 8192)) as sink:
        for seed in range(32):
            sink.write(np.random.default_rng(seed).integers(0, 255, (256, 8192, 3), dtype=np.uint8))
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "a.png")], capture_output=True, text=True, check=True)
    print(f"{int(done.stdout) / 1024:.0f} MiB")
    assert int(done.stdout) < 100 * 1024
