"""Takes all measures of one picture, with its base and tiles where known."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hires.errors import RequestError
from hires.images.boxes import (
    REC709,
    ArraySource,
    BoxSource,
    LanczosSource,
    averaged,
    bits_of,
    box_means,
    equal_parts,
    interval_means,
    luma,
)
from hires.metrics.ciede2000 import ciede2000, lab
from hires.metrics.contrast import contrast
from hires.metrics.duplicates import find_duplicates
from hires.metrics.measures import Consistency, Detail, Measures, TileDrift, Tiles
from hires.metrics.seams import lattice_power, profiles, seam_lines, seams
from hires.metrics.spectrum import Spectrum, base_cutoff, block_for, sharpness, spectrum
from hires.tiling.geometry import Box, Size, TileGrid, bands, cover

LEAST_PX = 16
STRETCHED, CUT = 0.05, 0.25  # log of the aspects: a base is stretched to the picture's up to the first, cut up to the second
BASE_ROWS = 64


def measure(
    source: BoxSource,
    base: NDArray[np.uint8] | None = None,
    *,
    base_size: Size | None = None,
    grid: TileGrid | None = None,
    cell_px: int | None = None,
    notes: tuple[str, ...] = (),
) -> Measures:
    """Everything at once, in about ten passes over boxes; memory beyond the picture's and the base's does not grow with height.

    Args:
        source: the picture.
        base: the picture (h, w, 3) that this one was drawn from.
        base_size: without `base`, the size of the part of it that is seen, if known: detail and duplicates are then measured
            against the picture itself, averaged down to that size.
        grid: the picture's tiles, in pixels; they may reach beyond it.
        cell_px: the side of a latent cell.
        notes: remarks that the result takes over.

    Raises:
        RequestError: a picture below 16 px, a base larger than it or of another shape.
    """
    size = source.size
    if min(size.height, size.width) < LEAST_PX:
        raise RequestError(f"picture of {size}: too small to be measured; give one of {LEAST_PX} px a side or more")
    given = None if base is None else _seen(base, size)
    small = given
    if small is None and base_size is not None:
        small = np.rint(averaged(source, base_size) * 255).astype(np.uint8)
    cutoff = 0.25 if small is None else base_cutoff(size, Size(*small.shape[:2]))
    sharp, spread = sharpness(source), spectrum(source, block_for(size, cutoff))
    enlarged = None if small is None or cutoff >= 0.5 else spectrum(LanczosSource(small, size), spread.block)
    return Measures(
        size=size,
        bits=bits_of(source),
        contrast=contrast(source),
        sharpness=sharp,
        spectrum=spread,
        enlarged=enlarged,
        detail=None
        if small is None or enlarged is None
        else _detail(source, Size(*small.shape[:2]), spread, enlarged, sharp.variance),
        consistency=None if given is None else consistency(source, given),
        duplicates=None if small is None else find_duplicates(source, small),
        tiles=None if grid is None else _tiles(source, given, grid, cell_px),
        notes=notes,
    )


def _seen(base: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    box = view_of(Size(*base.shape[:2]), size)
    return base[box.rows, box.cols]


def view_of(base: Size, size: Size) -> Box:
    """The part of a base picture that a picture of `size` shows, as in `resolution.relay_view`.

    All of it, or its middle where the aspects differ by over 5 %. RequestError for a base that is larger, or differs by
    over 25 %.
    """
    if base.height > size.height or base.width > size.width:
        raise RequestError(f"base of {base}: is larger than the picture of {size}; give the small picture as `base`")
    apart = abs(math.log(base.width * size.height / (base.height * size.width)))
    if apart >= CUT:
        raise RequestError(f"base of {base}: is of another shape than the picture of {size}; give the one it was drawn from")
    if apart < STRETCHED:
        return Box(0, 0, base.height, base.width)
    resized, box = cover(base, size)
    down, across = base.height / resized.height, base.width / resized.width
    return Box(round(box.top * down), round(box.left * across), round(box.height * down), round(box.width * across))


def _detail(source: BoxSource, base: Size, spread: Spectrum, enlarged: Spectrum, variance: float) -> Detail:
    cutoff = base_cutoff(source.size, base)
    energy, without = spread.energy(cutoff), enlarged.energy(cutoff)
    return Detail(
        base=base,
        cutoff=cutoff,
        energy=energy,
        share=energy / variance if variance else 0.0,
        kept_by_median=spectrum(source, spread.block, denoised=True).energy(cutoff) / energy if energy else 0.0,
        over_lanczos=energy / without if without > 1e-12 else None,
    )


def consistency(source: BoxSource, base: NDArray[np.uint8]) -> Consistency:
    """The picture, averaged down in bands, against a base picture (h, w, 3) that is nowhere larger than it."""
    cols = equal_parts(source.size.width, base.shape[1])
    rows = equal_parts(source.size.height, base.shape[0])
    squared = lightness = colour = 0.0
    for top, bottom in bands(base.shape[0], BASE_ROWS):
        small, own = interval_means(source, rows[top:bottom], cols), base[top:bottom] / 255
        squared += float(((small - own) ** 2).sum())
        lightness += float((((small - own) @ REC709) ** 2).sum())
        colour += float(ciede2000(lab(small), lab(own)).sum())
    count, spread = base.shape[0] * base.shape[1], float(luma(base).std(ddof=1, dtype=np.float64))
    return Consistency(
        psnr_db=float("inf") if squared == 0 else -10 * math.log10(squared / (3 * count)),
        delta_e=colour / count,
        drift=math.sqrt(lightness / count) / spread if spread else None,
    )


def _tiles(source: BoxSource, base: NDArray[np.uint8] | None, grid: TileGrid, cell_px: int | None) -> Tiles:
    size = source.size
    rows, cols = seam_lines(grid, 1)
    means = profiles(source, [row for row in rows if row < size.height], [col for col in cols if col < size.width])
    pitches = (_pitch(grid.tops, size.height), _pitch(grid.lefts, size.width))
    return Tiles(
        grid=grid,
        seams=seams(means),
        lattice_db=lattice_power(means, *pitches),
        cell_px=cell_px,
        cells_db=None if cell_px is None or cell_px < 3 else lattice_power(means, cell_px, cell_px),
        drift=None if base is None else tile_drift(source, base, grid),
    )


def _pitch(starts: tuple[int, ...], extent: int) -> float:
    """Pixels from tile to tile; the whole axis where there is one."""
    return (starts[-1] - starts[0]) / (len(starts) - 1) if len(starts) > 1 else float(extent)


def tile_drift(source: BoxSource, base: NDArray[np.uint8], grid: TileGrid) -> TileDrift:
    """Colours of tiles, cut where they leave the picture, against the same parts of the base."""
    size = source.size
    tops, lefts = [top for top in grid.tops if top < size.height], [left for left in grid.lefts if left < size.width]
    scale = base.shape[0] / size.height, base.shape[1] / size.width
    own = box_means(source, tops, lefts, grid.tile, (1.0, 1.0))
    wanted = box_means(ArraySource(base), tops, lefts, grid.tile, scale)
    apart = ciede2000(lab(own), lab(wanted))
    row, col = np.unravel_index(int(np.argmax(apart)), apart.shape)
    return TileDrift(
        mean_delta_e=float(apart.mean()),
        max_delta_e=float(apart.max()),
        worst=(int(row), int(col)),
        std_luma=float(((own - wanted) @ REC709).std()),
    )
