"""Ours beside what a user would take instead: the same weights and seeds, each at its defaults; speed, memory and quality.

    python -m benchmarks peers                                   # all parts; hours on two cores
    python -m benchmarks peers --parts "vae;attention" --sides 512,1024
    python -m benchmarks peers --quick                           # narrow networks and small pictures, into no file

Every row is a process of its own; rows that results/peers.csv has for the same code are kept. Duplicates, detail and FLOPs of
whole strategies are rows of `python -m benchmarks strategies`. The last line of stdout is one JSON document; the exit code is 1
where what is exact differs by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import EQUAL_DB, RESULTS
from benchmarks.peers import Way
from benchmarks.rows import STATE, Row, Suite, carried_out, child, in_child, newest, sides_of, timed

SUITE = Suite(
    name="peers",
    key=("part", "side", "way"),
    columns=(
        "version", "p20_s", "p50_s", "p80_s", "repeats", "peak_mib", "process_mib", "gflop", "psnr_db", "max_abs", "seam_score",
        "like", "note",
    ),
    code=(
        "bench_peers", "peers/__init__", "peers/autoencoders", "peers/attention", "peers/pipelines", "peers/upscalers",
        "bench_vae", "bench_scaling", "bench_io",
    ),
    limit_s=1200.0,
)  # fmt: skip
PICTURES = Path("runs/peers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """ways: the one that others are held against comes first, where they are `compared`. sides: of the picture, in full and
    where only the code is tried."""

    ways: tuple[str, ...]
    sides: tuple[int, ...]
    quick: tuple[int, ...]
    compared: bool = True


def parts() -> dict[str, Part]:
    from benchmarks.peers import attention, autoencoders, pipelines, upscalers

    return {
        "vae": Part(ways=autoencoders.WAYS, sides=(512, 1024, 2048), quick=(256,)),
        "vae, two pictures": Part(ways=autoencoders.PAIRS, sides=(512,), quick=(128,)),
        "small vae": Part(ways=autoencoders.TINY, sides=(512, 1024, 2048), quick=(256,)),
        "attention": Part(ways=attention.WAYS, sides=(1024, 2048), quick=(512,)),
        "SDXL pipeline": Part(ways=pipelines.WAYS, sides=(512, 1024, 2048), quick=(64, 128)),
        "PixArt-Sigma pipeline": Part(ways=pipelines.WAYS, sides=(512, 1024, 2048), quick=(64,)),
        "MultiDiffusion": Part(ways=pipelines.PANORAMA, sides=(768,), quick=(), compared=False),
        "SDXL pipeline, full width": Part(ways=(pipelines.PLAIN, pipelines.ATTACHED), sides=(1024,), quick=()),
        "PixArt-Sigma pipeline, full width": Part(ways=(pipelines.PLAIN, pipelines.ATTACHED), sides=(1024, 2048), quick=()),
        "io": Part(ways=("hires", "Pillow"), sides=(4096, 8192, 16384), quick=(512,), compared=False),
        "upscale": Part(ways=upscalers.WAYS, sides=(384,), quick=(96,)),
    }


def way_of(part: str, name: str, side: int, quick: bool) -> Way:
    from benchmarks.peers import attention, autoencoders, pipelines, upscalers

    makers: dict[str, Callable[[str, int, bool], Way]] = {
        "vae": autoencoders.decoder,
        "vae, two pictures": autoencoders.decoder,
        "small vae": autoencoders.decoder,
        "attention": attention.layer,
        "MultiDiffusion": pipelines.panorama,
        "upscale": upscalers.enlarged,
    }
    return makers[part](name, side, quick) if part in makers else pipelines.pipeline(part, name, side, quick)


def measured(case: Mapping[str, str]) -> Row:
    """One way of one part at one size, in this process."""
    import torch

    from hires.devices.memory import peak_resident_bytes

    part, name, side, quick = case["part"], case["way"], int(case["side"]), bool(case["quick"])
    if part == "io":
        return written(name, side)
    way = way_of(part, name, side, quick)
    with torch.inference_mode():
        if way.warm_up is not None:
            way.warm_up()
        result, found = timed(way.run, 1 if quick else way.repeats)
    found["process_mib"] = round(peak_resident_bytes() / 2**20, 1)
    return found | way.facts | compared(way, name, result, case)


def compared(way: Way, name: str, result: Any, case: Mapping[str, str]) -> Row:
    """How a result differs from that of the way it should be like, over the span of that; and its seams."""
    import numpy as np

    from hires.metrics.fidelity import psnr
    from hires.metrics.seams import seam_score

    values = np.asarray(result, dtype=np.float32)
    facts: Row = {"like": way.like or ""}
    if way.like == name:
        kept = reference(case, name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, values)
    elif way.like is not None and reference(case, way.like).exists():
        wanted = np.load(reference(case, way.like), mmap_mode="r")
        span = float(wanted.max() - wanted.min())
        facts["psnr_db"] = round(min(psnr(values, wanted, span), EQUAL_DB), 1)
        facts["max_abs"] = float(f"{np.abs(values - wanted).max() / span:.3g}")
    if way.rows or way.cols:
        planes = values.reshape(-1, *values.shape[-2:]).mean(0)
        planes = (planes - planes.min()) / max(float(np.ptp(planes)), 1e-9)
        facts["seam_score"] = round(seam_score(planes, way.rows, way.cols, cell_px=8), 3)
    return facts


def reference(case: Mapping[str, str], name: str) -> Path:
    """Where a way's result lies that others are held against."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in f"{case['part']} {case['side']} {name}")
    return Path(case["pictures"]) / f"{plain}.npy"


def written(name: str, side: int) -> Row:
    """A PNG of a photograph's mosaic, 8192 px wide and `side` high (square below that), by the suite `io`."""
    from benchmarks.peers import version_of
    from benchmarks.suites.io import in_child as io_child
    from hires.images.png import LEVEL
    from hires.tiling.geometry import Size

    way, package = ("sink", "hires") if name == "hires" else ("pillow", "pillow")
    found = io_child(way, ".png", "uint8", Size(side, min(side, 8192)), 1)
    seconds = {f"p{share}_s": found[f"write_p{share}_s"] for share in (20, 50, 80)}
    note = f"{found['width']}x{found['height']} px, {found['file_mb']} MB, zlib level {LEVEL}, one cold run"
    return seconds | {"repeats": 1, "process_mib": found["peak_rss_mib"], "version": version_of(package), "note": note}


def cases(chosen: Sequence[str], sides: Sequence[int], quick: bool, pictures: Path) -> Iterator[dict[str, str]]:
    for name in chosen:
        part = parts()[name]
        for side in part.quick if quick else part.sides:
            for way in part.ways if quick or not sides or side in sides else ():
                yield {"part": name, "side": str(side), "way": way, "quick": "yes" if quick else "", "pictures": str(pictures)}


def with_references(wanted: Sequence[dict[str, str]], threads: int) -> Iterator[dict[str, str]]:
    """The same cases; where a row is there but its result is not, that is drawn again before the others need it."""
    first: dict[tuple[str, str], dict[str, str]] = {}
    tried: set[tuple[str, str]] = set()
    for case in wanted:
        leader = first.setdefault((case["part"], case["side"]), case)
        held, place = case is not leader and parts()[case["part"]].compared, (case["part"], case["side"])
        if held and place not in tried and not reference(leader, leader["way"]).exists():
            tried.add(place)  # once: where it has no room, the others have nothing to be held against
            in_child(SUITE, leader, threads)
        yield case


EXACT = {"vae": 90.0, "vae, two pictures": 90.0, "small vae": 90.0}


def kept(rows: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """What is exact is so: our bands against the module itself, an attached pipeline at the trained size, global attention."""
    verdict = {}
    for row in rows:
        ours = "hires" in str(row["way"]) or row["way"] in ("diffusers, whole", "diffusers, two pictures")
        exact = ours and (row["part"] in EXACT or row["way"] in ("hires, global", "hires.attach"))
        name = f"{row['part']} {row['side']} {row['way']}"
        if exact and "hires" in str(row["way"]) and not str(row[STATE]).startswith(("ran", "skipped")):
            verdict[f"{name}: ran"] = False
        if exact and row[STATE] == "ran" and row["psnr_db"] not in ("", None):
            least = EXACT.get(str(row["part"]), 80.0)
            verdict[f"{name}: PSNR >= {least:g} dB"] = float(row["psnr_db"]) >= least
    return verdict


SHOWN = {"p50_s": "s", "peak_mib": "MiB", "process_mib": "MiB of the process", "psnr_db": "PSNR, dB", "seam_score": "seam"}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one table per part, with the columns that it has."""
    blocks = []
    for part in dict.fromkeys(str(row["part"]) for row in rows):
        own = [row for row in rows if row["part"] == part]
        columns = [name for name in SHOWN if any(row[name] not in ("", None) for row in own)]
        lines = [f"*{part}*", "", f"| | px | {' | '.join(SHOWN[name] for name in columns)} | |"]
        lines.append("|---" * (len(columns) + 3) + "|")
        for row in own:
            version = f" ({row['version']})" if row["version"] and "hires" not in str(row["version"]) else ""
            cells = (
                [shown(row, name) for name in columns] if row[STATE] == "ran" else [str(row[STATE]), *[""] * (len(columns) - 1)]
            )
            lines.append(f"| {row['way']}{version} | {row['side']} | {' | '.join(cells)} | {row['note'] or ''} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def shown(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value in ("", None):
        return ""
    number = float(value)
    if name == "psnr_db" and number == EQUAL_DB:
        return "equal"
    return f"{number:.{ {'p50_s': 2, 'psnr_db': 1, 'seam_score': 2}.get(name, 0) }f}"


def main(argv: list[str]) -> int:
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", default="", help=f"between semicolons, of: {'; '.join(known)}")
    parser.add_argument("--sides", default="", help="only these of a part's")
    parser.add_argument("--threads", type=int, help="of torch; default: one for each core, with --quick one")
    parser.add_argument("--quick", action="store_true", help="narrow networks and small pictures, into no file")
    parser.add_argument("--csv", type=Path, default=RESULTS / "peers.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child, measured)
    chosen = [name.strip() for name in args.parts.split(";") if name.strip()] or list(known)
    if any(name not in known for name in chosen):
        parser.error(f"--parts {args.parts!r}: of {'; '.join(known)}")
    threads = args.threads or (1 if args.quick else os.cpu_count() or 1)
    sides = sides_of(parser, args.sides)
    with tempfile.TemporaryDirectory() as folder:
        pictures = (Path(folder) if args.quick else PICTURES / SUITE.settings()).absolute()
        wanted = list(cases(chosen, sides, args.quick, pictures))
        rows = newest(
            carried_out(SUITE, with_references(wanted, threads), None if args.quick else args.csv, threads, measured), SUITE.key
        )
    print(table(rows), file=sys.stderr)
    verdict = kept(rows)
    print(json.dumps({"suite": "peers", "rows": rows, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
