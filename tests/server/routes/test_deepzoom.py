"""Tiles of a viewer put together again are the picture, at full size and halved."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hires.images.sinks import ImageSink
from hires.server.routes.deepzoom import TILE_PX, Pyramid, pyramid_of
from hires.tiling.geometry import Size


def smooth(size: Size, dtype: type = np.uint8) -> np.ndarray:
    y, x = np.mgrid[0 : size.height, 0 : size.width]
    top = np.iinfo(dtype).max
    planes = (x / size.width, y / size.height, (x + y) / (size.width + size.height))
    return np.stack([(plane * top).astype(dtype) for plane in planes], axis=2)


def assembled(pyramid: Pyramid, level: int) -> np.ndarray:
    rows = []
    row = 0
    while (first := pyramid.tile(level, 0, row)) is not None:
        tiles, column = [first], 1
        while (tile := pyramid.tile(level, column, row)) is not None:
            tiles.append(tile)
            column += 1
        rows.append(np.concatenate([np.asarray(Image.open(io.BytesIO(tile))) for tile in tiles], axis=1))
        row += 1
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("suffix", "dtype"), [(".png", np.uint8), (".tif", np.uint8), (".tif", np.uint16), (".png", np.uint16), (".jpg", np.uint8)]
)
@pytest.mark.parametrize("size", [Size(1333, 1801), Size(300, 511), Size(512, 1024), Size(513, 40)])
def test_tiles_are_the_picture(tmp_path: Path, suffix: str, dtype: type, size: Size) -> None:
    path, pixels = tmp_path / f"result{suffix}", smooth(size, dtype)
    with ImageSink.open(path, size, dtype=dtype) as sink:
        sink.write(pixels)
    pyramid = pyramid_of(path)
    eight = pixels if dtype is np.uint8 else (pixels >> 8)
    for level in range(pyramid.deepest + 1):
        halvings = pyramid.deepest - level
        found = assembled(pyramid, level)
        assert found.shape[:2] == (-(-size.height // 2**halvings), -(-size.width // 2**halvings))
        wanted = np.asarray(Image.fromarray(eight.astype(np.uint8)).resize(found.shape[1::-1], Image.Resampling.BOX))
        assert np.abs(found.astype(int) - wanted).mean() < 2.0, level
    assert max(pyramid.sizes[-1].height, pyramid.sizes[-1].width) <= TILE_PX
    assert pyramid.tile(pyramid.deepest + 1, 0, 0) is None and pyramid.tile(0, -1, 0) is None and pyramid.tile(0, 0, 99) is None


def test_a_pyramid_is_built_once_and_leaves_no_parts(tmp_path: Path) -> None:
    path = tmp_path / "result.png"
    with ImageSink.open(path, Size(900, 700)) as sink:
        sink.write(smooth(Size(900, 700)))
    first = pyramid_of(path)
    stamp = first.path.stat().st_mtime_ns
    assert pyramid_of(path).path.stat().st_mtime_ns == stamp
    assert sorted(file.name for file in tmp_path.iterdir()) == ["result.png", "result.png.view.tif"]
