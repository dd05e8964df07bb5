"""How fast pictures are written row by row and read back, in how much memory, and whether they are the same.

    python -m benchmarks io                        # 8192 px wide, 8192 and 16384 px tall, every format
    python -m benchmarks io --width 1024 --heights 512,1024 --repeats 1

Each row is a process of its own that makes its rows as it goes: a mosaic of a photograph of the test data (a texture where
there is none), so that its peak memory is that of writing. `pillow` holds the picture and writes it at once, at the same zlib
level. Rows go to results/io.csv. The last line of stdout is one JSON document; the exit code is 1 where a lossless file is not
exact, or a picture twice as tall takes over 1.1 times the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common import RESULTS, append_row, stamp
from hires.bench.timing import quantile
from hires.devices.memory import peak_resident_bytes
from hires.images.png import LEVEL
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.tiling.geometry import Box, Size

DATA = Path(os.environ.get("HIRES_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
PHOTO = DATA / "photos" / "flower_BSD3_2268x1512.png"
WAYS: tuple[tuple[str, str, str], ...] = (
    ("sink", ".png", "uint8"),
    ("sink", ".png", "uint16"),
    ("sink", ".tif", "uint8"),
    ("sink", ".tif", "uint16"),
    ("sink", ".tif", "float32"),
    ("sink", ".jpg", "uint8"),
    ("sink", ".webp", "uint8"),
    ("pillow", ".png", "uint8"),
)
LOSSY = (".jpg", ".webp")
BAND = 256
GROWTH = 1.1


def mosaic(size: Size, kind: str) -> Iterator[NDArray[Any]]:
    """Bands of a photograph repeated and mirrored; 16 bits and floats get noise below the eighth bit, as renders have."""
    tile = _photograph()
    rows = np.concatenate([tile, tile[::-1]])
    both = np.concatenate([rows, rows[:, ::-1]], axis=1)
    columns = np.arange(size.width) % both.shape[1]
    rng = np.random.default_rng(0)
    for top in range(0, size.height, BAND):
        band = both[np.arange(top, min(top + BAND, size.height)) % len(both)][:, columns]
        if kind == "uint8":
            yield band
            continue
        fine = band.astype(np.float32) * 257 + rng.integers(-128, 128, band.shape, dtype=np.int16)
        yield np.clip(fine, 0, 65535).astype(np.uint16) if kind == "uint16" else (fine / 65535).astype(np.float32)


def _photograph() -> NDArray[np.uint8]:
    if PHOTO.is_file():
        with Image.open(PHOTO) as picture:
            return np.asarray(picture.convert("RGB"))
    walk = np.cumsum(np.random.default_rng(0).normal(0, 1, (512, 768, 3)), axis=1)
    texture: NDArray[np.uint8] = ((walk - walk.min()) / np.ptp(walk) * 255).astype(np.uint8)
    return texture


def written(way: str, path: Path, size: Size, kind: str) -> float:
    """Seconds of writing, without those of making the rows."""
    spent = 0.0
    if way == "pillow":
        whole = np.concatenate(list(mosaic(size, kind)))
        begun = time.perf_counter()
        Image.fromarray(whole).save(path, compress_level=LEVEL)
        return time.perf_counter() - begun
    begun = time.perf_counter()
    with ImageSink.open(path, size, 3, kind, overwrite=True) as sink:
        spent += time.perf_counter() - begun
        for band in mosaic(size, kind):
            begun = time.perf_counter()
            sink.write(band)
            spent += time.perf_counter() - begun
        begun = time.perf_counter()
    return spent + time.perf_counter() - begun


def read(path: Path, size: Size, kind: str) -> tuple[float, bool]:
    """Seconds of reading all of it in bands, and whether it is what was written."""
    spent, same = 0.0, True
    with ImageSource.open(path) as source:
        for index, band in enumerate(mosaic(size, kind)):
            begun = time.perf_counter()
            found = source.read(Box(index * BAND, 0, len(band), size.width))
            spent += time.perf_counter() - begun
            same = same and np.array_equal(found, band)
    return spent, same


def measure(way: str, suffix: str, kind: str, size: Size, repeats: int) -> dict[str, object]:
    """What one process finds; run as `--child`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        seconds = [written(way, path, size, kind) for _ in range(repeats)]
        peak, content = peak_resident_bytes(), path.stat().st_size
        reading, same = read(path, size, kind)
    p20, p50, p80 = (quantile(seconds, share) for share in (0.2, 0.5, 0.8))
    return {
        "way": way,
        "format": suffix,
        "values": kind,
        "width": size.width,
        "height": size.height,
        "repeats": repeats,
        "write_p20_s": round(p20, 3),
        "write_p50_s": round(p50, 3),
        "write_p80_s": round(p80, 3),
        "write_mpx_per_s": round(size.area / 1e6 / p50, 1),
        "read_s": round(reading, 3),
        "file_mb": round(content / 1e6, 2),
        "peak_rss_mib": round(peak / 2**20, 1),
        "exact": int(same),
    }


def in_child(way: str, suffix: str, kind: str, size: Size, repeats: int) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks", "io", "--child", way, suffix, kind, str(size.width), str(size.height)]
    done = subprocess.run([*command, "--repeats", str(repeats)], capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def kept(rows: Sequence[dict[str, object]]) -> bool:
    """Lossless files are exact, and memory does not grow with the height."""
    sinks = [row for row in rows if row["way"] == "sink"]
    peaks: dict[tuple[object, object], list[float]] = {}
    for row in sinks:
        peaks.setdefault((row["format"], row["values"]), []).append(float(str(row["peak_rss_mib"])))
    exact = all(row["exact"] for row in sinks if row["format"] not in LOSSY)
    return exact and all(max(found) <= GROWTH * found[0] for found in peaks.values())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks io", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--heights", default="8192,16384", help="from low to tall")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=RESULTS / "io.csv")
    parser.add_argument("--child", nargs=5, metavar=("WAY", "FORMAT", "VALUES", "WIDTH", "HEIGHT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        way, suffix, kind, width, height = args.child
        print(json.dumps(measure(way, suffix, kind, Size(int(height), int(width)), args.repeats)))
        return 0
    rows = []
    for way, suffix, kind in WAYS:
        for height in map(int, args.heights.split(",")):
            if suffix == ".webp" and max(height, args.width) > 16_383:
                continue
            row = stamp() | in_child(way, suffix, kind, Size(height, args.width), args.repeats)
            append_row(args.csv, row)
            rows.append(row)
            print(row, file=sys.stderr)
    print(json.dumps({"suite": "io", "rows": rows}))
    return 0 if kept(rows) else 1
