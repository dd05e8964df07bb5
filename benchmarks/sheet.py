"""A figure of the strategies' pictures on the oracle, with every duplicate ringed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.oracle import find_objects
from benchmarks.outcome import averaged, drift
from benchmarks.recipes import ATTENTION, RECIPES, Work, base
from benchmarks.subjects import OracleSubject
from hires.tiling.geometry import Size

ACROSS = 4
LABEL = 30


def draw_sheet(target: Path, sigmas: Sequence[float], side: int = 256, seed: int = 0) -> None:
    """The base picture and each strategy's at `side` cells; a pixel per cell."""
    subject = OracleSubject()
    canvas = Size(side, side)
    first, _ = base(subject, canvas, seed, Work())
    cells: list[tuple[Image.Image, tuple[str, str]]] = [(shown(first, side), ("base picture, 64 x 64 cells", "one object"))]
    for name, recipe in RECIPES.items():
        if name == "base" or name in ATTENTION:
            continue
        for sigma in sigmas if name.startswith("relay") else sigmas[:1]:
            latents, _ = recipe(OracleSubject(relay_sigma=sigma), canvas, seed, Work())
            found = find_objects(latents[0, 0], subject.oracle)
            title = f"{name}, sigma {sigma:g}" if name.startswith("relay") else name
            off = drift(averaged(latents[0, 0], (64, 64)), first[0, 0])
            words = f"{len(found)} duplicate{'' if len(found) == 1 else 's'}, drift {off:.2f}"
            cells.append((ringed(shown(latents, side), found), (title, words)))
    rows = -(-len(cells) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (side + 4) - 4, rows * (side + LABEL)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, lines) in enumerate(cells):
        x, y = index % ACROSS * (side + 4), index // ACROSS * (side + LABEL)
        sheet.paste(picture, (x, y))
        for line, text in enumerate(lines):
            pen.text((x + 2, y + side + 2 + 12 * line), text, fill="black")
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target, quality=82)


def shown(latents: Tensor, side: int) -> Image.Image:
    """Latents (1, 1, h, w) from -2 to 5 as grey, a smaller picture enlarged."""
    grey = ((latents[0, 0].clamp(-2, 5) + 2) * (255 / 7)).numpy().astype(np.uint8)
    return Image.fromarray(grey).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def ringed(picture: Image.Image, found: Sequence[tuple[int, int]]) -> Image.Image:
    pen = ImageDraw.Draw(picture)
    for row, col in found:
        pen.ellipse((col - 12, row - 12, col + 12, row + 12), outline=(230, 60, 40), width=2)
    return picture
