"""Render held-out captions with each strategy and measure them against the scene drawn at the same size.

    python -m benchmarks scenes                     # 32 at 1024, 8 at 2048, 1 at 4096 progressive; a few tiled and direct
    python -m benchmarks scenes --counts 2,0,0 --tiled 1,0,0 --direct 0,0,0

Rows are appended to results/scenes.csv as they come; rows that exist for the same weights, code and settings are kept
and not rendered again. Contact sheets go beside the CSV. The last line of stdout is one JSON document with the summary and
whether progressive keeps its limits; the exit code is 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import hires
from benchmarks.common import RESULTS, append_row, code_of_pictures, digest, read_rows, stamp
from benchmarks.demo.held_out import held_out_scenes
from benchmarks.demo.scenes import Scene, draw_bands
from benchmarks.disks import find_disks, local_band_energy, lopsided_disks, mean_colour, third_of
from hires.checkpoints.spec import load_spec
from hires.devices.memory import reset_resident_peak
from hires.images.boxes import ArraySource, luma
from hires.metrics.fidelity import band_energy
from hires.metrics.seams import Seams, lattice_score, profiles, seam_lines, seam_score, seams
from hires.planning.plan import MemoryPlan
from hires.tiling.geometry import Size, bands

SIZES = (1024, 2048, 4096)
Picture = NDArray[np.uint8]


def ground_truth(scene: Scene, side: int) -> Picture:
    """The scene itself at that size, uint8."""
    bands = [(band * 255 + 0.5).astype(np.uint8) for band in draw_bands(scene, Size(side, side))]
    return np.concatenate(bands)


def lanczos(picture: Picture, side: int) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def sky_part(picture: NDArray[np.generic], scene: Scene) -> NDArray[np.generic]:
    """The sky of a third of the picture where no disk belongs: rows 4 to 40 %."""
    h, w = picture.shape[:2]
    left = 0.68 if scene.third != "right" else 0.02
    return picture[int(0.04 * h) : int(0.40 * h), int(left * w) : int((left + 0.30) * w)]


def tile_seams(picture: NDArray[np.float32], plan: MemoryPlan, cell_px: int) -> float:
    """The seam score of the last stage's tile grid, against grids on the decoder's cells."""
    rows, cols = seam_lines(plan.latent_grid, cell_px)
    rows, cols = (tuple(line for line in part if line < side) for part, side in zip((rows, cols), picture.shape, strict=True))
    return seam_score(picture, rows, cols, cell_px=cell_px)


def band_seams(picture: NDArray[np.uint8], plan: MemoryPlan, cell_px: int) -> Seams:
    """The same of the decoder's bands, with its p-value: bands are exact, so over many pictures that is uniform.

    A grid of a few whole lines scores high or low by what happens to lie on them; one picture's score says nothing.
    """
    height = plan.canvas.height
    rows = [top for top, _ in bands(height, plan.decode.band_rows or height)][1:]
    return seams(profiles(ArraySource(picture), [row for row in rows if row < picture.shape[0]], ()), cell_px=cell_px)


def measure(scene: Scene, picture: Picture, plan: MemoryPlan, base: Picture) -> dict[str, object]:
    """All measures of one render against its ground truth and against the base picture enlarged by Lanczos.

    Energies are those beyond the base picture's Nyquist frequency, every part of the picture counting alike; `texture` leaves
    out what touches a disk, whose outline outweighs all else at night.
    """
    side = picture.shape[0]
    truth, enlarged = ground_truth(scene, side), lanczos(base, side)
    cutoff = base.shape[0] / (2 * side)
    light = luma(picture)
    disks = find_disks(picture)
    lopsided = lopsided_disks(picture, disks)
    every_disk = [*disks, *lopsided, *find_disks(truth)]
    lights = light, luma(truth), luma(enlarged)
    energy, energy_truth, energy_enlarged = (local_band_energy(p, cutoff) for p in lights)
    texture, texture_truth, texture_enlarged = (local_band_energy(p, cutoff, every_disk) for p in lights)
    sky, sky_truth = (band_energy(luma(sky_part(p, scene)), cutoff) for p in (picture, truth))
    found = band_seams(picture, plan, 8)
    columns = (0.70, 1.0) if scene.third != "right" else (0.0, 0.30)
    colour = {
        name: float(np.abs(mean_colour(picture, rows, columns) - mean_colour(truth, rows, columns)).max() * 255)
        for name, rows in (("sky", (0.05, 0.40)), ("ground", (0.75, 0.98)))
    }
    return {
        "disks": len(disks),
        "lopsided": len(lopsided),
        "third": "+".join(third_of(disk.x) for disk in disks) or "none",
        "wanted_third": scene.third,
        "one_disk_right_third": int(len(disks) == 1 and not lopsided and third_of(disks[0].x) == scene.third),
        "sky_colour_error_255": round(colour["sky"], 1),
        "ground_colour_error_255": round(colour["ground"], 1),
        "seam_over_control": round(tile_seams(light, plan, 8), 3),
        "band_seam_over_control": round(found.score, 3),
        "band_p_value": round(found.p_value, 3),
        "lattice_8px": round(lattice_score(light, 8), 3),
        "energy_over_lanczos": round(energy / energy_enlarged, 2),
        "energy_over_truth": round(energy / energy_truth, 3),
        "texture_over_lanczos": round(texture / texture_enlarged, 2),
        "texture_over_truth": round(texture / texture_truth, 3),
        "sky_energy_over_truth": round(sky / sky_truth, 3),
    }


def settings_digest() -> str:
    """Changes with the weights, the defaults and the code that makes pictures."""
    return digest(code_of_pictures())


def run(wanted: dict[str, tuple[int, ...]], csv_path: Path, pictures: Path) -> list[dict[str, str]]:
    """Render and measure what is missing; return all rows that belong to these settings."""
    key = settings_digest()
    bases: dict[int, Picture] = {}
    for strategy, per_size in wanted.items():
        for side, count in zip(SIZES, per_size, strict=True):
            for scene in held_out_scenes(count):
                done = {(r["settings"], r["strategy"], r["side"], r["caption"]) for r in read_rows(csv_path)}
                if (key, strategy, str(side), scene.caption) in done:
                    continue
                if scene.seed not in bases:
                    bases[scene.seed] = hires.render(scene.caption, size="256x256", seed=scene.seed).pixels
                reset_resident_peak()
                result = hires.render(scene.caption, size=(side, side), seed=scene.seed, strategy=strategy)
                facts = {"settings": key, "strategy": strategy, "side": side, "caption": scene.caption, "seed": scene.seed}
                row = stamp() | facts | measure(scene, result.pixels, result.plan, bases[scene.seed])
                row |= {"seconds": round(result.seconds, 1), "peak_rss_gib": round(result.peak_rss_bytes / 2**30, 2)}
                append_row(csv_path, row)
                pictures.mkdir(parents=True, exist_ok=True)
                Image.fromarray(result.pixels).save(pictures / f"{strategy}_{side}_{scene.seed}.png")
                print({k: row[k] for k in list(facts)[1:] + list(row)[-13:]}, file=sys.stderr, flush=True)
    return [row for row in read_rows(csv_path) if row["settings"] == key]


def measure_again(csv_path: Path, pictures: Path) -> None:
    """Replace the measures of all rows whose picture is there; what was rendered, its seconds and bytes stay.

    The stamp becomes that of the measuring code; `settings` still names the code that rendered.
    """
    rows = read_rows(csv_path)
    scenes = {scene.seed: scene for scene in held_out_scenes(32)}
    bases: dict[int, Picture] = {}
    fresh = []
    for row in rows:
        scene, side = scenes[int(row["seed"])], int(row["side"])
        file = pictures / f"{row['strategy']}_{side}_{scene.seed}.png"
        if not file.exists():
            raise SystemExit(f"{file}: is not there to be measured again; render it first")
        if scene.seed not in bases:
            bases[scene.seed] = hires.render(scene.caption, size="256x256", seed=scene.seed).pixels
        plan = hires.plan(size=(side, side), strategy=row["strategy"])
        facts = {name: row[name] for name in ("settings", "strategy", "side", "caption", "seed")}
        taken = {name: row[name] for name in ("seconds", "peak_rss_gib")}
        fresh.append(stamp() | facts | measure(scene, np.asarray(Image.open(file)), plan, bases[scene.seed]) | taken)
    csv_path.unlink()
    for line in fresh:
        append_row(csv_path, line)


def summary(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Per strategy and size: how many, the share with exactly one disk where it belongs, and the measures' ranges."""
    table: list[dict[str, Any]] = []
    for strategy, side in sorted({(r["strategy"], int(r["side"])) for r in rows}):
        part = [r for r in rows if r["strategy"] == strategy and int(r["side"]) == side]

        def values(name: str, part: list[dict[str, str]] = part) -> NDArray[np.float64]:
            return np.asarray([float(r[name]) for r in part])

        table.append(
            {
                "strategy": strategy,
                "side": side,
                "pictures": len(part),
                "one_disk_right_third": round(float(values("one_disk_right_third").mean()), 3),
                "mean_disks": round(float((values("disks") + values("lopsided")).mean()), 2),
                "seam_max": round(float(values("seam_over_control").max()), 3),
                "band_seam_max": round(float(values("band_seam_over_control").max()), 3),
                "band_p_value_mean": round(float(values("band_p_value").mean()), 3),
                "lattice_8px_max": round(float(values("lattice_8px").max()), 3),
                "energy_over_lanczos_min": round(float(values("energy_over_lanczos").min()), 2),
                "energy_over_truth_min": round(float(values("energy_over_truth").min()), 3),
                "energy_over_truth_max": round(float(values("energy_over_truth").max()), 3),
                "texture_over_truth_median": round(float(np.median(values("texture_over_truth"))), 3),
                "texture_over_lanczos_median": round(float(np.median(values("texture_over_lanczos"))), 2),
                "sky_energy_over_truth_max": round(float(values("sky_energy_over_truth").max()), 3),
                "sky_colour_error_255_median": round(float(np.median(values("sky_colour_error_255"))), 1),
                "seconds_median": round(float(np.median(values("seconds"))), 1),
            }
        )
    return table


def limits(table: list[dict[str, Any]]) -> dict[str, bool]:
    """What progressive promises, per size: one disk in its third, no seams, real detail, no noise taken for it."""
    verdict = {}
    for line in (line for line in table if line["strategy"] == "progressive"):
        name = f"{line['side']}: "
        verdict[name + "one disk in its third in 96 %"] = line["one_disk_right_third"] >= 0.96
        verdict[name + "seam over control <= 1.15"] = max(line["seam_max"], line["band_seam_max"]) <= 1.15
        # three standard errors below the mean of as many uniform values
        verdict[name + "no band is seen"] = line["band_p_value_mean"] >= 0.5 - 3 * (12 * line["pictures"]) ** -0.5
        verdict[name + "energy over Lanczos >= 10"] = line["energy_over_lanczos_min"] >= 10
        verdict[name + "energy over truth 0.5 to 1.5"] = (
            line["energy_over_truth_min"] >= 0.5 and line["energy_over_truth_max"] <= 1.5
        )
        verdict[name + "sky energy over truth <= 2"] = line["sky_energy_over_truth_max"] <= 2
    return verdict


def counts(text: str) -> tuple[int, ...]:
    """'32,8,1' as three numbers, one per size."""
    try:
        numbers = tuple(int(n) for n in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != len(SIZES) or min(numbers) < 0:
        raise SystemExit(f"{text!r}: give three numbers of pictures, for {', '.join(map(str, SIZES))}, such as 2,0,0")
    return numbers


def contact_sheet(rows: list[dict[str, str]], strategy: str, side: int, pictures: Path, target: Path, cell: int = 192) -> None:
    """All pictures of a strategy and size, shrunk, with their caption and disk count; nothing where there are none."""
    part = [r for r in rows if r["strategy"] == strategy and int(r["side"]) == side]
    files = [(r, pictures / f"{strategy}_{side}_{r['seed']}.png") for r in part]
    files = [(r, f) for r, f in files if f.exists()]
    if not files:
        return
    across = min(8, len(files))
    labels = [[*wrap(r["caption"], cell // 6 - 1), f"disks: {r['disks']} + {r['lopsided']} lopsided"] for r, _ in files]
    tall = cell + 4 + 11 * max(len(lines) for lines in labels)
    sheet = Image.new("RGB", (across * cell, -(-len(files) // across) * tall), "white")
    pen = ImageDraw.Draw(sheet)
    for index, ((_, file), lines) in enumerate(zip(files, labels, strict=True)):
        x, y = index % across * cell, index // across * tall
        sheet.paste(Image.open(file).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        for number, line in enumerate(lines):
            pen.text((x + 2, y + cell + 11 * number), line, fill="black")
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, quality=88)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scenes", description=__doc__.split("\n")[0])
    parser.add_argument("--counts", default="32,8,1", help="progressive renders at 1024, 2048, 4096")
    parser.add_argument("--tiled", default="4,1,0", help="renders of `tiled` from noise at the same sizes")
    parser.add_argument("--direct", default="2,0,0", help="renders in one piece at the same sizes")
    parser.add_argument("--csv", type=Path, default=RESULTS / "scenes.csv")
    parser.add_argument("--pictures", type=Path, default=Path("runs/scenes"), help="where full-size renders are kept")
    parser.add_argument("--measure-again", action="store_true", help="render nothing, measure the kept pictures of all rows")
    args = parser.parse_args(argv)
    numbers = {"progressive": counts(args.counts), "tiled": counts(args.tiled), "direct": counts(args.direct)}
    assert load_spec("demo").cell_px == 8
    if args.measure_again:
        measure_again(args.csv, args.pictures)
        rows = read_rows(args.csv)
    else:
        rows = run(numbers, args.csv, args.pictures)
    for strategy, per_size in numbers.items():
        for side, count in zip(SIZES, per_size, strict=True):
            if count:
                target = args.csv.with_name(f"{args.csv.stem}_{strategy}_{side}.jpg")
                contact_sheet(rows, strategy, side, args.pictures, target)
    table = summary(rows)
    verdict = limits(table)
    print(json.dumps({"suite": "scenes", "summary": table, "limits": verdict}))
    return 0 if all(verdict.values()) else 1
