"""A figure of the strategies' pictures: on the oracle, every duplicate ringed, and on a scene where its pictures were kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.oracle import find_objects
from benchmarks.outcome import averaged, drift
from benchmarks.recipes import ATTENTION, RECIPES, Work, base
from benchmarks.subjects import OracleSubject
from hires.tiling.geometry import Size

ACROSS = 5
SIDE = 256
LABEL = 30
Cell = tuple[Image.Image, str, str]


def draw_sheet(target: Path, sigmas: Sequence[float], rows: Sequence[Mapping[str, str]], pictures: Path | None) -> None:
    """The base picture and each strategy's on the oracle at 4x, then those of a scene in `pictures`, labelled from its rows."""
    blocks = [list(oracle_cells(sigmas)), [] if pictures is None else list(scene_cells(rows, pictures))]
    lines = [block[i : i + ACROSS] for block in blocks for i in range(0, len(block), ACROSS)]
    sheet = Image.new("RGB", (ACROSS * (SIDE + 4) - 4, len(lines) * (SIDE + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for down, line in enumerate(lines):
        for across, (picture, *words) in enumerate(line):
            x, y = across * (SIDE + 4), down * (SIDE + LABEL)
            sheet.paste(picture, (x, y))
            for number, text in enumerate(words):
                pen.text((x + 2, y + SIDE + 2 + 12 * number), text, fill="black")
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, quality=82)


def oracle_cells(sigmas: Sequence[float], seed: int = 0) -> Iterator[Cell]:
    """A pixel per cell."""
    subject, canvas = OracleSubject(), Size(SIDE, SIDE)
    first, _ = base(subject, canvas, seed, Work())
    yield shown(first), "oracle: its picture of 64 cells", f"{len(find_objects(first[0, 0], subject.oracle))} object"
    for name, recipe in RECIPES.items():
        if name == "base" or name in ATTENTION:
            continue
        for sigma in sigmas if name.startswith("relay") else sigmas[:1]:
            latents, _ = recipe(OracleSubject(relay_sigma=sigma), canvas, seed, Work())
            found = find_objects(latents[0, 0], subject.oracle)
            title = f"{name}, sigma {sigma:g}" if name.startswith("relay") else name
            off = drift(averaged(latents[0, 0], first.shape[-2:]), first[0, 0])
            yield ringed(shown(latents), found), title, told(len(found), off)


def scene_cells(rows: Sequence[Mapping[str, str]], pictures: Path) -> Iterator[Cell]:
    """Of the rows on scenes, those whose first caption's picture was kept, shrunk."""
    for row in (row for row in rows if row["model"] == "scenes"):
        file = pictures / picture_name(row["strategy"], int(row["side"]), row["relay_sigma"], 0)
        if file.exists():
            picture = Image.open(file).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            yield picture, f"{row['strategy']}, {row['side']} px", told(float(row["duplicates"]), float(row["drift"]))


def picture_name(strategy: str, side: int, sigma: str, seed: int) -> str:
    """The file of a scene's picture; `sigma` as the row has it."""
    words = [strategy.replace(" + ", "-").replace(" ", "-"), str(side), *([sigma] if sigma else []), str(seed)]
    return "_".join(words) + ".png"


def told(duplicates: float, off: float) -> str:
    return f"{duplicates:g} duplicate{'' if duplicates == 1 else 's'}, drift {off:.2f}"


def shown(latents: Tensor) -> Image.Image:
    """Latents (1, 1, h, w) from -2 to 5 as grey, a smaller picture enlarged."""
    grey = ((latents[0, 0].clamp(-2, 5) + 2) * (255 / 7)).numpy().astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")


def ringed(picture: Image.Image, found: Sequence[tuple[int, int]]) -> Image.Image:
    pen = ImageDraw.Draw(picture)
    for row, col in found:
        pen.ellipse((col - 12, row - 12, col + 12, row + 12), outline=(230, 60, 40), width=2)
    return picture
