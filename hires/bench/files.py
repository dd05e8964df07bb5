"""Measures writing, reading and enlarging pictures, beside whole-picture ways.

The suites io and upscale of `hires bench`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hires.bench.row import BenchSetup, Row
from hires.bench.timing import Timed
from hires.errors import HiresError
from hires.images.boxes import Pixels
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.options.keywords import UpscaleKeywords
from hires.tiling.geometry import Box, Size

FORMATS = ((".png", "uint8"), (".png", "uint16"), (".tif", "uint8"), (".tif", "uint16"), (".jpg", "uint8"), (".webp", "uint8"))
BAND_PX = 256


def io_rows(setting: BenchSetup) -> Iterator[Row]:
    """Pictures written by rows and read back, beside Pillow, which holds them whole."""
    for size in setting.of("io"):
        pixels = noisy_gradient(size)
        with tempfile.TemporaryDirectory() as folder:
            for suffix, kind in FORMATS:
                coded = pixels if kind == "uint8" else pixels.astype(np.uint16) * 257
                yield from _banded_rows(setting, Path(folder) / f"a{suffix}", coded)
            yield _pillow_row(setting, Path(folder) / "pillow.png", pixels)


def noisy_gradient(size: Size) -> NDArray[np.uint8]:
    """A picture (H, W, 3) that compresses about as a photograph does."""
    y, x = np.mgrid[0 : size.height, 0 : size.width]
    noise = np.random.default_rng(0).integers(0, 24, (size.height, size.width), dtype=np.uint8)
    return np.stack([(x * 199 // size.width + noise), (y * 199 // size.height + noise), noise * 8], axis=2).astype(np.uint8)


def _banded_rows(setting: BenchSetup, path: Path, coded: Pixels) -> Iterator[Row]:
    """Writing a picture (H, W, 3) band by band, and reading it back."""
    size, case = Size(*coded.shape[:2]), f"{path.suffix} {coded.dtype}"
    write, read = partial(_write, path, coded), partial(_read, path, size)
    row = Row(suite="io", case=f"write {case}", way="ImageSink", size=str(size), moved=float(coded.nbytes))
    try:
        row = replace(row, taken=setting.time(write))
    except HiresError as error:  # WebP's 16383 px
        yield replace(row, taken=Timed(state=f"refused: {error}"))
        return
    yield replace(row, measured_peak_bytes=setting.peak_of(write), measure="bits a pixel", quality=_bits_a_pixel(path, size))
    same = float(np.array_equal(np.concatenate(read()), coded))
    yield Row(
        suite="io",
        case=f"read {case}",
        way="ImageSource",
        size=str(size),
        moved=float(coded.nbytes),
        taken=setting.time(read),
        measure="exact",
        quality=same,
    )


def _pillow_row(setting: BenchSetup, path: Path, pixels: NDArray[np.uint8]) -> Row:
    """Writing the picture (H, W, 3) by Pillow, which needs all of it."""
    size, write = Size(*pixels.shape[:2]), Image.fromarray(pixels).save
    row = Row(suite="io", case="write .png uint8", way="Pillow", size=str(size), moved=float(pixels.nbytes))
    row = replace(row, taken=setting.time(lambda: write(path)))
    peak = pixels.nbytes + (setting.peak_of(lambda: write(path)) or 0)
    return replace(row, measured_peak_bytes=peak, measure="bits a pixel", quality=_bits_a_pixel(path, size))


def _write(path: Path, coded: Pixels) -> None:
    height, width = coded.shape[:2]
    with ImageSink.open(path, Size(height, width), dtype=coded.dtype, overwrite=True) as sink:
        for top in range(0, height, BAND_PX):
            sink.write(coded[top : top + BAND_PX])


def _read(path: Path, size: Size) -> list[Pixels]:
    with ImageSource.open(path) as source:
        tops = range(0, size.height, BAND_PX)
        return [source.read(Box(top, 0, min(BAND_PX, size.height - top), size.width)) for top in tops]


def _bits_a_pixel(path: Path, size: Size) -> float:
    return 8 * path.stat().st_size / size.area


def upscale_rows(setting: BenchSetup) -> Iterator[Row]:
    """Four times a picture of the given size: by Lanczos, by a network if one is named, and refined by the model."""
    for size in setting.of("upscale"):
        yield from _upscale_at(setting, size)


def _upscale_at(setting: BenchSetup, size: Size) -> Iterator[Row]:
    from hires.engine.upscale import upscale

    side = np.linspace(0, 20, size.area * 3).reshape(size.height, size.width, 3)
    picture = ((np.sin(side * 37) + 1) * 127).astype(np.uint8)
    target = Size(4 * size.height, 4 * size.width)
    reference = np.asarray(Image.fromarray(picture).resize((target.width, target.height), Image.Resampling.LANCZOS))
    shared: UpscaleKeywords = {"size": target, "device": str(setting.device), "vram": setting.vram, "parts": setting.parts}
    ways: list[tuple[str, UpscaleKeywords]] = [("lanczos", shared)]
    if setting.upscaler:
        ways.append((Path(setting.upscaler).name, {**shared, "upscaler": setting.upscaler}))
    steps = 4 if setting.quick else None
    refined: UpscaleKeywords = {**shared, "refine": True, "strength": 0.3, "model": setting.model, "steps": steps}
    for way, options in [*ways, ("lanczos, refined", refined)]:

        def run(options: UpscaleKeywords = options) -> Pixels:
            enlarged: Pixels = upscale(picture, **options).pixels
            return enlarged

        single = "refine" in options
        begun = time.perf_counter()
        result = run()
        once = time.perf_counter() - begun
        taken = Timed(p20=once, p50=once, p80=once, repeats=1) if single else setting.time(run)
        difference = float(np.abs(result.astype(np.float64) - reference).mean())
        row = Row(suite="upscale", case="x4", way=way, size=str(size), moved=float(result.nbytes + picture.nbytes), taken=taken)
        yield replace(
            row,
            measured_peak_bytes=None if single else setting.peak_of(run),
            measure="mean difference to Lanczos",
            quality=difference,
        )
