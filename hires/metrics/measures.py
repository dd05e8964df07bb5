"""The measures of one picture, and their table for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from hires.metrics.contrast import FULL, VIVID, Contrast
from hires.metrics.duplicates import Copies
from hires.metrics.seams import Seams
from hires.metrics.spectrum import Sharpness, Spectrum
from hires.tiling.geometry import Size, TileGrid
from hires.units import Json

SEAM_MARK, SEAM_P, DELTA_E_MARK = 1.25, 0.05, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """Energy beyond the Nyquist frequency of the base picture."""

    base: Size
    """The base picture's size."""
    cutoff: float
    """That frequency, in cycles per pixel."""
    energy: float
    """The mean square of luma beyond it."""
    share: float
    """Its share of the variance of luma."""
    kept_by_median: float
    """How much of it a 3 x 3 median leaves; noise loses most."""
    over_lanczos: float | None
    """How many times that of the base enlarged by Lanczos it is; None where that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Consistency:
    """The picture averaged down (means over equal parts, coded values) against its base."""

    psnr_db: float
    """Peak signal-to-noise ratio."""
    delta_e: float
    """The mean CIEDE2000."""
    drift: float | None
    """RMS of the difference in luma over the base's standard deviation; None for a flat base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileDrift:
    """Mean colours of tiles against the same parts of the base."""

    mean_delta_e: float
    """The mean CIEDE2000."""
    max_delta_e: float
    """The largest CIEDE2000."""
    worst: tuple[int, int]
    """Row and column of the tile with the largest."""
    std_luma: float
    """The standard deviation over tiles of the difference in luma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """What is seen of the tiles."""

    grid: TileGrid
    seams: Seams
    lattice_db: float | None
    """`seams.lattice_power` at the tiles' pitch."""
    cell_px: int | None
    """The side of the decoder's cells in pixels; None where it is not known."""
    cells_db: float | None
    """`seams.lattice_power` at the decoder's cells."""
    drift: TileDrift | None
    """None without a base picture."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Measures:
    """The measures of one picture; what needs a base or tiles is None without. Printed, they are a table."""

    size: Size
    bits: int | None
    """Of each value, 8 or 16; None for floats."""
    contrast: Contrast
    sharpness: Sharpness
    spectrum: Spectrum
    enlarged: Spectrum | None
    """The spectrum of the base enlarged by Lanczos."""
    detail: Detail | None
    consistency: Consistency | None
    duplicates: Copies | None
    tiles: Tiles | None
    notes: tuple[str, ...] = ()
    """Remarks on how the measures were taken."""

    def explain(self, name: str = "the picture") -> str:
        """The table that `hires measure` prints, under the picture's name."""
        return "\n".join(lines(name, self))

    def __repr__(self) -> str:
        return self.explain()

    def to_json(self) -> Json:
        """As plain JSON values; infinite ones are null."""
        tones, duplicates = asdict(self.contrast) | {"mark": self.contrast.mark}, self.duplicates
        del tones["histogram"]
        boxes = None if duplicates is None else [[*asdict(copy.box).values(), copy.likeness] for copy in duplicates.copies]
        document = {
            "size": str(self.size),
            "bits": self.bits,
            "contrast": tones,
            "sharpness": asdict(self.sharpness),
            "spectral_slope": self.spectrum.slope(),
            "detail": None if self.detail is None else asdict(self.detail) | {"base": str(self.detail.base)},
            "consistency": None if self.consistency is None else asdict(self.consistency),
            "duplicates": None if boxes is None else len(boxes),
            "duplicate_boxes": boxes,
            "duplicate_threshold": None if duplicates is None else duplicates.threshold,
            "tiles": None if self.tiles is None else asdict(self.tiles),
            "notes": list(self.notes),
        }
        return {name: _finite(value) for name, value in document.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
