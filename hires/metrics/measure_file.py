"""Measures a picture: a file, a PIL image or an array.

The grid comes from the option or from the plan in the PNG.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from hires.errors import RequestError
from hires.images.boxes import ArraySource
from hires.images.formats import read_text
from hires.images.sources import PictureLike
from hires.images.whole import read_picture
from hires.metrics.measure import measure as measures_of
from hires.metrics.measure import view_of
from hires.metrics.measures import Measures
from hires.tiling.geometry import Size, TileGrid, make_grid
from hires.units import Json

LEAST_PITCH = 8  # px from tile to tile, so that there is room for random grids between


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a plan in a PNG says of its picture."""

    grid: TileGrid
    """Its tiles in pixels, which may reach beyond it."""
    cell_px: int
    """The side of a latent cell."""
    base: Size | None
    """The size of the base picture, where there was one."""


def measure(picture: PictureLike, *, base: PictureLike | None = None, grid: str | None = None) -> Measures:
    """Measure a picture: contrast, detail beyond its base, seams against random grids, drift of tiles, duplicates.

    What `hires measure` prints; a PNG that hires wrote brings its tiles and the size of its base along.

    Args:
        picture: a path, a PIL image, or (height, width, 3) uint8, uint16 or float in [0, 1], of 16 px a side or more. Files and
            PIL images are measured in 8 bits.
        base: the small picture that it was drawn from, a path, a PIL image or (height, width, 3) uint8; for detail,
            consistency and duplicates.
        grid: "TILE:OVERLAP" in pixels, such as "1024:256", instead of the tiles in the PNG; for seams and drift.

    Returns:
        Measures: printed they are a table, `to_json()` gives plain values; what there is no base or no grid for is None.

    Raises:
        RequestError: what is no picture, no grid, or does not fit.
    """
    return measure_and_keep(picture, base, grid)[0]


def measure_and_keep(
    picture: PictureLike, base: PictureLike | None = None, grid: str | None = None
) -> tuple[Measures, ArraySource]:
    """The measures, and the picture's pixels for drawing; arguments and errors as in `measure`."""
    source = ArraySource(picture if isinstance(picture, np.ndarray) else read_picture(picture))
    small = None if base is None else read_picture(base)
    plan, notes = planned(_text_of(picture), source.size)
    own = None if plan is None else plan.grid
    chosen = own if grid is None else parse_grid(grid, source.size)
    size, cell = (None, None) if plan is None else (plan.base, plan.cell_px)
    return measures_of(source, small, base_size=size, grid=chosen, cell_px=cell, notes=notes), source


def _text_of(picture: PictureLike) -> str | None:
    """The plan that hires saved in a PNG; None where there is none."""
    if isinstance(picture, Image.Image):
        text = picture.info.get("hires:plan")
        return None if text is None else str(text)
    if isinstance(picture, np.ndarray):
        return None
    try:
        return read_text(Path(picture)).get("hires:plan")
    except RequestError:
        return None


def parse_grid(text: str, size: Size) -> TileGrid:
    """'1024:256' as the planner's grid of tiles of 1024 px that share 256 or more, over a picture of `size`.

    RequestError for anything else, and where one tile holds the whole picture.
    """
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
    if match is None:
        raise RequestError(f"grid {text[:60]}: give TILE:OVERLAP in pixels, such as 1024:256")
    tile, overlap = int(match[1]), int(match[2])
    if not overlap < tile:
        raise RequestError(f"grid {text}: the overlap must be below the tile; try {tile or 1024}:{(tile or 1024) // 4}")
    if tile - overlap < LEAST_PITCH:
        raise RequestError(f"grid {text}: edges would lie under {LEAST_PITCH} px apart; give less overlap or larger tiles")
    if tile >= size.height and tile >= size.width:
        raise RequestError(f"grid {text}: one tile holds all of {size}, so there is no edge; give a smaller tile")
    return make_grid(size, Size(tile, tile), overlap)


def planned(text: str | None, size: Size) -> tuple[Planned | None, tuple[str, ...]]:
    """The plan in the text of a PNG, or None; and notes that say why one is not used."""
    if text is None:
        return None, ()
    try:
        return _planned(json.loads(text), size)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        return None, (f"its hires:plan cannot be read ({type(error).__name__}: {error}); give `grid`",)


def _planned(plan: Json, size: Size) -> tuple[Planned | None, tuple[str, ...]]:
    output, canvas = Size(**plan["output"]), Size(**plan["canvas"])
    if output != size:
        return None, (f"its hires:plan is of a picture of {output} and not used; give `grid`",)
    cells, grid = Size(**plan["latent_grid"]["canvas"]), plan["latent_grid"]
    cell = canvas.height // cells.height
    tiles = TileGrid(
        canvas=cells.times(cell),
        tile=Size(**grid["tile"]).times(cell),
        tops=tuple(cell * int(top) for top in grid["tops"]),
        lefts=tuple(cell * int(left) for left in grid["lefts"]),
    )
    first = Size(**plan["stages"][0]["canvas"])
    return Planned(grid=tiles, cell_px=cell, base=None if first == canvas else _base_seen(first, canvas, size)), ()


def _base_seen(base: Size, canvas: Size, size: Size) -> Size:
    """The part of a base picture that is in the picture, which is cut from the top left of its canvas."""
    box = view_of(base, canvas)
    return Size(max(1, box.height * size.height // canvas.height), max(1, box.width * size.width // canvas.width))
