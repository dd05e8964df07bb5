"""A TIFF that is cut short or damaged is refused by every reader; a whole one of any layout is read as before."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from hires.cli.app import app
from hires.errors import RequestError
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.images.tiff_check import check_whole_tiff
from hires.images.whole import read_picture
from hires.tiling.geometry import Box, Size

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("pyvips")
SIDE = 640
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (128, 128)},
    "packed tiles": {"tile": (128, 128), "compression": "zlib"},
    "big": {"tile": (128, 128), "bigtiff": True},
    "big-endian": {"tile": (128, 128), "byteorder": ">"},
    "big-endian big": {"tile": (128, 128), "byteorder": ">", "bigtiff": True, "compression": "zlib"},
    "strips": {"rowsperstrip": 16},
    "packed strips": {"rowsperstrip": 16, "compression": "zlib"},
    "turned tiles": {"tile": (128, 128), "extratags": [(274, 3, 1, 6, True)]},
}


def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(3).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)


def written(path: Path, layout: str) -> bytes:
    if layout == "own":
        with ImageSink.open(path, Size(SIDE, SIDE), overwrite=True) as sink:
            sink.write(pixels())
    else:
        tifffile.imwrite(path, pixels(), photometric="rgb", **LAYOUTS[layout])
    return path.read_bytes()


def read_whole(path: Path) -> NDArray[Any]:
    with ImageSource.open(path) as source:
        return np.array(source.read(Box(0, 0, source.size.height, source.size.width)))


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("layout", ["own", *LAYOUTS])
def test_a_file_cut_anywhere_is_refused_by_every_reader(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "a.tif"
    content = written(path, layout)
    expected = np.rot90(pixels(), -1) if layout == "turned tiles" else pixels()
    assert np.array_equal(read_whole(path), expected)
    assert np.array_equal(read_picture(path), expected)
    for share in (0.01, 0.2, 0.5, 0.6, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        for reader in (read_whole, read_picture, ImageSource.open):
            with pytest.raises(RequestError, match=r"a\.tif: .*(copy or download it again|give a picture file)"):
                reader(path)


def test_the_commands_refuse_it(tmp_path: Path) -> None:
    path, out = tmp_path / "a.tif", tmp_path / "o.png"
    content = written(path, "own")
    path.write_bytes(content[: len(content) // 2])
    for command in (
        ["upscale", str(path), "--scale", "0.5", "-o", str(out)],
        ["render", "a moon", "--size", "64x64", "--steps", "1", "--init", str(path), "-o", str(out)],
        ["measure", str(path)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "a.tif: the TIFF is cut short or damaged" in " ".join(result.stderr.split())
        assert not out.exists()


def test_of_several_pages_the_last_counts_too(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for _ in range(3):
            writer.write(pixels(), photometric="rgb", tile=(128, 128))
    content = path.read_bytes()
    assert np.array_equal(read_whole(path), pixels())
    for share in (0.3, 0.5, 0.7, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(RequestError, match="cut short"):
            ImageSource.open(path)


@pytest.mark.parametrize("damage", ["bytes", "empty"])
def test_a_tile_that_cannot_be_decoded_is_an_error(tmp_path: Path, damage: str) -> None:
    """The file is as long as it should be: libvips itself has to say so."""
    path = tmp_path / "a.tif"
    content = bytearray(written(path, "packed tiles"))
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        first = page.dataoffsets[7]
        counts = page.tags[325].valueoffset
    if damage == "bytes":
        content[first : first + 500] = b"\xff" * 500
    else:
        content[counts + 28 : counts + 32] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"a\.tif"):
        read_whole(path)


def test_no_pixel_is_read_to_find_out(tmp_path: Path) -> None:
    """A sparse file of 8 GiB, most of which is not on the disk, is checked as fast as a small one."""
    path = tmp_path / "a.tif"
    content = bytearray(written(path, "big"))
    with tifffile.TiffFile(path) as file:
        where = file.pages[0].tags[324].valueoffset
    content[where : where + 8] = struct.pack("<Q", 2**33)
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"tile 0 ends at byte 8,589,983,744"):
        check_whole_tiff(path)
    with path.open("r+b") as opened:
        opened.truncate(2**33 + 2**20)
    check_whole_tiff(path)


def test_hostile_directories_end(tmp_path: Path) -> None:
    """A directory that names itself as the next, and lists longer than the file, are no endless work."""
    path = tmp_path / "a.tif"
    path.write_bytes(struct.pack("<2sHIHI", b"II", 42, 8, 0, 8))
    check_whole_tiff(path)
    path.write_bytes(struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, 2**60))
    with pytest.raises(RequestError, match="a directory ends at"):
        check_whole_tiff(path)


def test_what_libtiff_only_warns_of_is_read(tmp_path: Path) -> None:
    """Private tags make libtiff warn."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, pixels(), photometric="rgb", tile=(128, 128), extratags=[(65000, 3, 1, 7, True), (65001, 2, 0, "x", True)]
    )
    assert np.array_equal(read_whole(path), pixels())
    Image.fromarray(pixels()).save(path, compression="tiff_lzw")
    assert np.array_equal(read_whole(path), pixels())
