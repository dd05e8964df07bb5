"""`hires bench io | upscale`: pictures written, read and enlarged, beside what holds them whole."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hires.bench.row import BenchSetup, Row
from hires.bench.timing import Timed
from hires.errors import HiresError
from hires.tiling.geometry import Size


def io_rows(setting: BenchSetup) -> Iterator[Row]:
    """Pictures written by rows and read back, beside Pillow, which holds them whole."""
    for size in setting.of("io"):
        yield from _io_at(setting, size)


def _io_at(setting: BenchSetup, size: Size) -> Iterator[Row]:
    from PIL import Image

    from hires.images.sinks import ImageSink
    from hires.images.sources import ImageSource
    from hires.tiling.geometry import Box

    y, x = np.mgrid[0 : size.height, 0 : size.width]
    noise = np.random.default_rng(0).integers(0, 24, (size.height, size.width), dtype=np.uint8)
    pixels = np.stack([(x * 199 // size.width + noise), (y * 199 // size.height + noise), noise * 8], axis=2).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for suffix, kind in (
            (".png", "uint8"),
            (".png", "uint16"),
            (".tif", "uint8"),
            (".tif", "uint16"),
            (".jpg", "uint8"),
            (".webp", "uint8"),
        ):
            coded = pixels if kind == "uint8" else pixels.astype(np.uint16) * 257
            path = Path(folder) / f"a{suffix}"

            def write(path: Path = path, coded: Any = coded, kind: str = kind) -> None:
                with ImageSink.open(path, size, dtype=kind, overwrite=True) as sink:
                    for top in range(0, size.height, 256):
                        sink.write(coded[top : top + 256])

            row = Row(
                suite="io",
                case=f"write {suffix} {kind}",
                way="ImageSink",
                size=str(size),
                moved=float(coded.nbytes),
            )
            try:
                row = replace(row, taken=setting.time(write))
            except HiresError as error:  # WebP's 16383 px
                yield replace(row, taken=Timed(state=f"refused: {error}"))
                continue
            yield replace(
                row,
                measured_peak_bytes=setting.peak_of(write),
                measure="bits a pixel",
                quality=8 * path.stat().st_size / size.area,
            )

            def read(path: Path = path) -> Any:
                with ImageSource.open(path) as source:
                    return [
                        source.read(Box(top, 0, min(256, size.height - top), size.width)) for top in range(0, size.height, 256)
                    ]

            same = float(np.array_equal(np.concatenate(read()), coded))
            yield Row(
                suite="io",
                case=f"read {suffix} {kind}",
                way="ImageSource",
                size=str(size),
                moved=float(coded.nbytes),
                taken=setting.time(read),
                measure="exact",
                quality=same,
            )
        path = Path(folder) / "pillow.png"

        def whole() -> None:
            Image.fromarray(pixels).save(path)

        row = Row(
            suite="io",
            case="write .png uint8",
            way="Pillow",
            size=str(size),
            moved=float(pixels.nbytes),
            taken=setting.time(whole),
        )
        yield replace(
            row,
            measured_peak_bytes=pixels.nbytes + (setting.peak_of(whole) or 0),  # it needs all of the picture
            measure="bits a pixel",
            quality=8 * path.stat().st_size / size.area,
        )


def upscale_rows(setting: BenchSetup) -> Iterator[Row]:
    """Four times a picture of the given size: by Lanczos, by a network if one is named, and refined by the model."""
    for size in setting.of("upscale"):
        yield from _upscale_at(setting, size)


def _upscale_at(setting: BenchSetup, size: Size) -> Iterator[Row]:
    from PIL import Image

    from hires.engine.upscale import upscale

    side = np.linspace(0, 20, size.area * 3).reshape(size.height, size.width, 3)
    picture = ((np.sin(side * 37) + 1) * 127).astype(np.uint8)
    target = Size(4 * size.height, 4 * size.width)
    reference = np.asarray(Image.fromarray(picture).resize((target.width, target.height), Image.Resampling.LANCZOS))
    ways: list[tuple[str, dict[str, Any]]] = [("lanczos", {})]
    ways += [(Path(setting.upscaler).name, {"upscaler": setting.upscaler})] if setting.upscaler else []
    ways += [
        (
            "lanczos, refined",
            {"refine": True, "strength": 0.3, "model": setting.model, "steps": 4 if setting.quick else None},
        )
    ]
    for way, options in ways:

        def run(options: dict[str, Any] = options) -> Any:
            common = {"device": str(setting.device), "vram": setting.vram, "parts": setting.parts} | options
            return upscale(picture, size=target, **common).pixels

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
