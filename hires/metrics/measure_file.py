"""Measures a picture file and lays the measures out as a table.

The grid comes from the option or from the plan in the PNG.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hires.errors import RequestError
from hires.images.boxes import ArraySource
from hires.images.formats import read_text
from hires.images.whole import read_picture
from hires.metrics.contrast import FULL, VIVID, Contrast
from hires.metrics.measure import Measures, measure, view_of
from hires.tiling.geometry import Size, TileGrid, make_grid
from hires.units import Json

LEAST_PITCH = 8  # px from tile to tile, so that there is room for random grids between
SEAM_MARK, SEAM_P, DELTA_E_MARK = 1.25, 0.05, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What a plan in a PNG says of its picture."""

    grid: TileGrid
    """Its tiles in pixels, which may reach beyond it."""
    cell_px: int
    """The side of a latent cell."""
    base: Size | None
    """The size of the base picture, where there was one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    """What was measured."""
    value: str
    """How much, with its unit."""
    remark: str = ""
    """What that means."""
    alarm: bool = False
    """Whether it is past its mark."""


def measure_file(file: str | Path, base: str | Path | None = None, grid: str | None = None) -> tuple[Measures, ArraySource]:
    """Measure a picture file, and give it back for drawing.

    Args:
        file: a picture; a PNG that hires wrote brings its grid and the size of its base along.
        base: the small picture it was drawn from.
        grid: 'TILE:OVERLAP' in pixels instead of the plan's.

    Raises:
        RequestError: what is no picture, no grid, or does not fit.
    """
    source = ArraySource(read_picture(file))
    small = None if base is None else read_picture(base)
    plan, notes = planned(file, source.size)
    own = None if plan is None else plan.grid
    chosen = own if grid is None else parse_grid(grid, source.size)
    size, cell = (None, None) if plan is None else (plan.base, plan.cell_px)
    return measure(source, small, base_size=size, grid=chosen, cell_px=cell, notes=notes), source


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


def planned(file: str | Path, size: Size) -> tuple[Planned | None, tuple[str, ...]]:
    """The plan that hires saved in a PNG, or None; and notes that say why a saved one is not used."""
    try:
        text = read_text(Path(file)).get("hires:plan")
    except RequestError:
        return None, ()
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


def rows_of(measures: Measures) -> list[Row]:
    """The table."""
    return [*_tones(measures), *_detail(measures), *_base(measures), *_tiles(measures)]


def _tones(measures: Measures) -> list[Row]:
    tones, bits = measures.contrast, measures.bits
    most = f"; {bits} bits can show at most {tones.ceiling:.0f}:1" if bits else ""
    sign = ">= " if tones.at_least else ""
    return [
        Row("contrast", f"{sign}{tones.ratio:.4g}:1", f"{marks(tones)}{most}"),
        Row("RMS contrast", f"{tones.rms:.3f}", "of relative luminance"),
    ]


def marks(tones: Contrast) -> str:
    """Where a contrast ratio lies between what displays are asked for."""
    below = [f"below {mark:.0f}:1" for mark in (VIVID, FULL) if tones.ratio < mark][:1]
    above = [f"above {mark:.0f}:1" for mark in (VIVID, FULL) if tones.ratio >= mark][-1:]
    return f"{tones.mark}: {', '.join(above + below)}"


def _detail(measures: Measures) -> Iterator[Row]:
    yield Row("Laplacian variance", f"{measures.sharpness.laplacian:.3g}", "of luma in [0, 1]; noise counts as well")
    yield Row("spectral slope", f"{measures.spectrum.slope():.2f}", "power ~ frequency^slope; photographs have about -2")
    detail = measures.detail
    if detail is None:
        yield Row("detail beyond base", "-", "not measured: give `base` FILE")
        return
    where = f"mean square above {detail.cutoff:.3g} cycles/px (base {detail.base}), {100 * detail.share:.2g} % of the variance"
    yield Row("detail beyond base", f"{detail.energy:.3g}", where)
    over = "-" if detail.over_lanczos is None else f"{detail.over_lanczos:.3g} x"
    yield Row("  over Lanczos", over, "1 x is an enlargement without new detail")
    yield Row(
        "  kept by a median",
        f"{100 * detail.kept_by_median:.0f} %",
        "of 3 x 3 px; beyond 1/8 cycles/px noise keeps 12 %, photographs over 50 %",
    )


def _base(measures: Measures) -> Iterator[Row]:
    held = measures.consistency
    if held is None:
        yield Row("base consistency", "-", "not measured: give `base` FILE")
    else:
        drift = "" if held.drift is None else f", off by {held.drift:.2g} standard deviations"
        yield Row("base consistency", f"{held.psnr_db:.1f} dB", f"PSNR averaged down; mean dE2000 {held.delta_e:.2f}{drift}")
    if measures.duplicates is None:
        yield Row("duplicates", "-", "not measured: give `base` FILE")
        return
    copies = measures.duplicates.copies
    remark = f"of the base's subject at its own size, NCC {measures.duplicates.threshold:.2f} or more"
    yield Row("duplicates", str(len(copies)), remark, bool(copies))


def _tiles(measures: Measures) -> Iterator[Row]:
    tiles = measures.tiles
    if tiles is None:
        yield Row("seams", "-", "not measured: give `grid` TILE:OVERLAP")
        return
    seen = tiles.seams.score >= SEAM_MARK and tiles.seams.p_value <= SEAM_P
    word, grid = "seen" if seen else "none seen", tiles.grid
    layout = f"{len(grid.lefts)} x {len(grid.tops)} tiles of {grid.tile} px"
    remark = f"{word} (mark {SEAM_MARK} at p <= {SEAM_P}), p = {tiles.seams.p_value:.2g}; {layout}"
    yield Row("seams", f"{tiles.seams.score:.2f}", remark, seen)
    if tiles.seams.fakes:
        yield Row(
            "  visibility",
            f"{tiles.seams.visibility:.2f}",
            f"median of {tiles.seams.fakes} random grids {tiles.seams.median:.2f}",
        )
    if tiles.lattice_db is None:
        yield Row("lattice power", "-", "fewer than four tiles along either side")
    else:
        yield Row("lattice power", f"{tiles.lattice_db:+.1f} dB", "at the tiles' pitch over frequencies between; 0 without")
    if tiles.cells_db is not None:
        yield Row("  decoder cells", f"{tiles.cells_db:+.1f} dB", f"the same at {tiles.cell_px} px")
    if tiles.drift is None:
        yield Row("tile drift", "-", "not measured: give `base` FILE")
        return
    drift, row, col = tiles.drift, *tiles.drift.worst
    above = drift.max_delta_e > DELTA_E_MARK
    verdict = "above" if above else "below"
    largest = f"largest {drift.max_delta_e:.2f} (row {row + 1}, column {col + 1}), {verdict} {DELTA_E_MARK:.0f}"
    yield Row("tile drift", f"{drift.mean_delta_e:.2f} dE2000", f"mean; {largest}; luma {drift.std_luma:.2g}", above)


def lines(name: str, measures: Measures) -> list[str]:
    """The table as text for people."""
    depth = f"{measures.bits} bits" if measures.bits else "floats"
    table = [f"  {row.name:<20} {row.value:<14} {row.remark}".rstrip() for row in rows_of(measures)]
    return [f"{name}: {measures.size}, {depth} per channel", *table, *(f"  note: {note}" for note in measures.notes)]
