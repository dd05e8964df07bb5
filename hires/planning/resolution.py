"""Chooses the sizes that are rendered for a size that is delivered.

In exact integers; the size delivered is always the requested one.
"""

from __future__ import annotations

import functools
import math

from hires.checkpoints.families import FamilyFacts
from hires.checkpoints.model import ModelSpec
from hires.tiling.geometry import Size, round_up, snap

SIZE_CLASSES = (256, 512, 1024, 2048, 2880, 4096)  # sides of the square bin; 2880 is the area of 3840x2160


def make_bins(native_px: int, align_px: int) -> tuple[Size, ...]:
    """Canvas sizes of about native area, aspect 1:4 to 4:1, both sides multiples of `align_px`; one per height."""
    bins = []
    for height in range(round_up(native_px // 2, align_px), 2 * native_px + 1, align_px):
        width = max(align_px, round(native_px * native_px / height / align_px) * align_px)
        bins.append(Size(height, width))
    return tuple(bins)


@functools.cache
def aspect_bins(size_class: int) -> tuple[Size, ...]:
    """The 40 sizes, aspect 1:4 to 4:1, that PixArt-Σ and α were trained on in that class; lowest height first.

    The rule behind the published tables: at 1024 every pair of multiples of 64 px with an area from 0.9 to 1 times 1024^2,
    but for height 1344, width 704. The other classes are this one scaled; in that of 2880 sides are rounded down to
    multiples of 64 px and 3776x2112 gives way to the screens' 3840x2112 (and so on its side). All sides are multiples of
    16 px. ValueError for any other class.
    """
    if size_class not in SIZE_CLASSES:
        raise ValueError(f"no bins for the size class {size_class}; known: {', '.join(map(str, SIZE_CLASSES))}")
    sides = range(512, 2049, 64)
    pairs = [(h, w) for h in sides for w in sides if 0.9 * 1024**2 <= h * w <= 1024**2 and (h, w) != (1344, 704)]
    if size_class != 2880:
        return tuple(Size(h * size_class // 1024, w * size_class // 1024) for h, w in pairs)
    screens = {(2112, 3776): (2112, 3840), (3776, 2112): (3840, 2112)}
    floored = [(h * 2880 // 1024 // 64 * 64, w * 2880 // 1024 // 64 * 64) for h, w in pairs]
    return tuple(Size(*screens.get(pair, pair)) for pair in floored)


@functools.cache
def bins_for(facts: FamilyFacts, native_px: int, align_px: int) -> tuple[Size, ...]:
    """The sizes a model's base pictures are rendered at: PixArt's own table, for others bins of about native area."""
    if facts.network == "pixart" and facts.bins is not None:
        return aspect_bins(facts.bins)
    return make_bins(native_px, max(align_px, 64 if native_px >= 512 else align_px))


def bins_of(spec: ModelSpec) -> tuple[Size, ...]:
    """The sizes that base pictures of a model are rendered at."""
    return bins_for(spec.facts, spec.native_px, spec.align_px)


def nearest_bin(size: Size, bins: tuple[Size, ...]) -> Size:
    """The bin whose aspect ratio is nearest on a logarithmic scale, so that portrait and landscape are alike."""
    aspect = math.log(size.height / size.width)
    return min(bins, key=lambda b: (abs(math.log(b.height / b.width) - aspect), -b.area))


def base_canvas(canvas: Size, bins: tuple[Size, ...], align_px: int) -> Size:
    """The size a base picture is rendered at: the nearest bin, or beyond the bins' aspects one of the same area."""
    near = nearest_bin(canvas, bins)
    aspect = canvas.width / canvas.height
    if abs(math.log(aspect * near.height / near.width)) < 0.25:
        return near
    height = max(align_px, round(math.sqrt(near.area / aspect) / align_px) * align_px)
    width = max(align_px, round(math.sqrt(near.area * aspect) / align_px) * align_px)
    if aspect > 1:
        return Size(height, max(align_px, round(height * aspect / align_px) * align_px))
    return Size(max(align_px, round(width / aspect / align_px) * align_px), width)


def stage_canvases(canvas: Size, bins: tuple[Size, ...], align_px: int, growth: float = 2.0) -> tuple[Size, ...]:
    """Canvases from the model's bin to `canvas`, each at most about `growth` times the side of the one before.

    A canvas no larger than its bin's area is one stage.
    """
    base = base_canvas(canvas, bins, align_px)
    ratio = math.sqrt(canvas.area / base.area)
    if ratio <= 1.25:
        return (canvas,)
    count = max(1, math.ceil(math.log(ratio, growth) - 0.05))
    sizes = [base]
    for k in range(1, count):
        scale = ratio ** (k / count) / ratio
        sizes.append(snap(Size(math.ceil(canvas.height * scale - 1e-6), math.ceil(canvas.width * scale - 1e-6)), align_px))
    return (*sizes, canvas)
