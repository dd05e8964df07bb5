"""Finds copies of a picture's subject at the size that the model draws by itself.

Windows that know nothing of each other leave such copies.

Normalised cross-correlation (NCC) of the base picture's subject with the large picture, pixel for pixel. On a large picture
that is one picture the subject is as much larger as the canvas is, so what is found at native size is a duplicate, unless the
base enlarged shows as much there: an edge that looks like the subject's own. What counts as found is set by the same picture
with its phases drawn at random: the same spectrum, and no objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hires.images.boxes import BoxSource, Doubles, Floats, LanczosSource, luma, unit
from hires.tiling.geometry import Box, Size

LIKENESS = 0.55  # the least NCC of a copy
OWN_LIKENESS = 0.45  # and of what the enlarged base has itself, which is not as sharp
AMPLITUDE = 0.4  # the least contrast of a copy over the subject's own
SUBJECT_SHARE = 6  # the subject is looked for in windows of a sixth of the shorter side
LEAST_SUBJECT_PX, MOST_SUBJECT_PX = 12, 192
NULL_DRAWS = 32
APART = 0.75  # of the subject's window, which it does not fill
FALSE_COPIES = 0.05  # expected in a whole picture by chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Where a copy is, in pixels of the large picture, and its NCC."""

    box: Box
    likeness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """All copies, strongest first. threshold: the NCC that they had to reach."""

    copies: tuple[Copy, ...]
    threshold: float


def subject_box(picture: Floats) -> Box:
    """The window (a sixth of the shorter side, 12 to 192 px) of a picture (h, w) that resembles its surroundings least.

    The greatest smaller eigenvalue of the structure tensor (Shi & Tomasi 1994): an outline turns, a horizon does not.
    """
    thin = max(1, min(picture.shape) // 512)  # a large base is looked at in fewer of its pixels
    small = picture[::thin, ::thin]
    side = min(max(LEAST_SUBJECT_PX, min(small.shape) // SUBJECT_SHARE), *small.shape)
    values = small.astype(np.float64)
    down, across = (np.asarray(np.gradient(values, axis=axis), dtype=np.float64) for axis in (0, 1))
    a, b, c = (_window_sums(part, (side, side)) for part in (down**2, down * across, across**2))
    least = (a + c) / 2 - np.hypot((a - c) / 2, b)
    top, left = (thin * int(at) for at in np.unravel_index(int(np.argmax(least)), least.shape))
    extent = min(side * thin, MOST_SUBJECT_PX)
    inset = (side * thin - extent) // 2
    return Box(top + inset, left + inset, extent, extent)


def find_duplicates(source: BoxSource, base: NDArray[np.uint8], seed: int = 0) -> Copies:
    """Copies of the subject of a base picture (h, w, 3) that the base, enlarged by Lanczos to the picture's size, has not."""
    box = subject_box(luma(base))
    subject = unit(base[box.rows, box.cols])
    copies, enlarged = find_copies(source, subject, seed), LanczosSource(base, source.size)
    return replace(copies, copies=tuple(copy for copy in copies.copies if not _is_own(enlarged, copy, subject)))


def _is_own(enlarged: BoxSource, copy: Copy, subject: Floats) -> bool:
    """Whether the enlarged base looks like the subject as well, in the neighbourhood of a copy."""
    box, size = copy.box, enlarged.size
    down, across = int(APART * box.height), int(APART * box.width)
    top, left = max(0, box.top - down), max(0, box.left - across)
    bottom, right = min(size.height, box.bottom + down), min(size.width, box.right + across)
    around = enlarged.read(Box(top, left, bottom - top, right - left))
    return float(_likeness(unit(around), subject).max()) >= OWN_LIKENESS


def find_copies(source: BoxSource, subject: Floats, seed: int = 0) -> Copies:
    """Every place where the picture looks like `subject` (h, w, 3) in [0, 1]. None for a flat subject.

    Likeness must reach 0.55, and what phase-randomised blocks of the same picture would reach FALSE_COPIES times: a Gumbel law
    fitted to the greatest NCC (Fisher's z) of `NULL_DRAWS` of them. The picture is read in boxes that overlap by the subject.
    """
    threshold = LIKENESS
    if (
        np.ptp(subject, axis=(0, 1)).max() < 1e-3
        or subject.shape[0] > source.size.height
        or subject.shape[1] > source.size.width
    ):
        return Copies(copies=(), threshold=threshold)
    by_chance = _by_chance(source, _boxes(source.size, subject.shape[:2]), subject, np.random.default_rng(seed))
    threshold = max(LIKENESS, by_chance)
    return Copies(copies=_all_copies(source, subject, threshold), threshold=threshold)


def _all_copies(source: BoxSource, subject: Floats, threshold: float) -> tuple[Copy, ...]:
    copies: list[Copy] = []
    for box in _boxes(source.size, subject.shape[:2]):
        copies += _peaks(_likeness(unit(source.read(box)), subject), box, subject.shape[:2], threshold)
    return _strongest(copies)


def _boxes(size: Size, subject: tuple[int, ...]) -> list[Box]:
    """Boxes whose places for the subject cover all of the picture's once."""
    side = max(512, 2 ** int(np.ceil(np.log2(4 * max(subject)))))
    steps = tuple(side - extent + 1 for extent in subject)
    tops = range(0, size.height - subject[0] + 1, steps[0])
    lefts = range(0, size.width - subject[1] + 1, steps[1])
    return [Box(top, left, min(side, size.height - top), min(side, size.width - left)) for top in tops for left in lefts]


def _likeness(part: Floats, subject: Floats) -> Doubles:
    """NCC at each place (H - h + 1, W - w + 1), over all colours at once, each without its mean.

    0 where the contrast is below AMPLITUDE of the subject's.
    """
    (height, width), window = part.shape[:2], subject.shape[:2]
    places = height - window[0] + 1, width - window[1] + 1
    product, values = np.zeros(places), part - part.mean((0, 1), dtype=np.float64)
    own = subject - subject.mean((0, 1), dtype=np.float64)
    for channel in range(3):
        spectrum = np.conj(np.fft.rfft2(own[..., channel], (height, width)))
        match = np.fft.irfft2(np.fft.rfft2(values[..., channel]) * spectrum, (height, width))
        product += match[: places[0], : places[1]]
    energy = float((own**2).sum())
    reached = product >= AMPLITUDE * energy
    if not reached.any():
        return np.zeros(places)
    spread = _window_sums((values**2).sum(-1), window)
    for channel in range(3):
        spread -= _window_sums(values[..., channel], window) ** 2 / (window[0] * window[1])
    likeness: Doubles = np.where(reached, product / np.sqrt(np.maximum(spread, 1e-9 * energy) * energy), 0.0)
    return likeness


def _window_sums(values: Doubles, window: tuple[int, ...]) -> Doubles:
    total = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    np.cumsum(np.cumsum(values, axis=0), axis=1, out=total[1:, 1:])
    h, w = window
    sums: Doubles = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    return sums


def _by_chance(source: BoxSource, boxes: list[Box], subject: Floats, rng: np.random.Generator) -> float:
    """The NCC that FALSE_COPIES places of a picture without objects reach; 0 where too few draws reach the contrast."""
    heights = []
    for index in rng.integers(len(boxes), size=NULL_DRAWS):
        part = _phases_drawn(unit(source.read(boxes[index])), rng)
        heights.append(float(_likeness(part, subject).max()))
    reached = np.arctanh(np.minimum([height for height in heights if height > 0], 1 - 1e-9))
    if len(reached) < 4 or not reached.std():
        return float(np.tanh(reached.max())) if len(reached) else 0.0
    scale = reached.std(ddof=1) * np.sqrt(6) / np.pi
    per_box = FALSE_COPIES / (len(boxes) * len(reached) / NULL_DRAWS)
    return float(np.tanh(reached.mean() - np.euler_gamma * scale - scale * np.log(-np.log1p(-min(per_box, 0.5)))))


def _phases_drawn(part: Floats, rng: np.random.Generator) -> Floats:
    """A field with the spectra and cross-spectra of a part of the picture, Hann-windowed with its energy kept.

    All colours of a frequency are turned by one random phase.
    """
    window = np.outer(*(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in part.shape[:2]))
    noise = np.fft.rfft2(rng.standard_normal(part.shape[:2]))
    turn = noise / np.maximum(np.abs(noise), 1e-12) / np.sqrt(np.mean(window**2))
    drawn = np.empty_like(part)
    for channel in range(3):
        level = float((part[..., channel] * window).sum() / window.sum())
        drawn[..., channel] = np.fft.irfft2(np.fft.rfft2((part[..., channel] - level) * window) * turn, part.shape[:2])
    return drawn


def _peaks(likeness: Doubles, box: Box, subject: tuple[int, ...], threshold: float) -> list[Copy]:
    """The greatest first, its neighbourhood taken out, until none reaches the threshold."""
    copies: list[Copy] = []
    down, across = (max(1, int(APART * extent)) for extent in subject)
    while True:
        row, col = np.unravel_index(int(np.argmax(likeness)), likeness.shape)
        height = float(likeness[row, col])
        if height < threshold:
            return copies
        where = Box(box.top + int(row), box.left + int(col), subject[0], subject[1])
        copies.append(Copy(box=where, likeness=height))
        likeness[max(0, row - down) : row + down + 1, max(0, col - across) : col + across + 1] = 0


def _strongest(copies: list[Copy]) -> tuple[Copy, ...]:
    """Those that are not in the neighbourhood of a stronger one: boxes meet where a peak may lie."""
    strongest: list[Copy] = []
    for copy in sorted(copies, key=lambda copy: -copy.likeness):
        if not any(_near(copy, other) for other in strongest):
            strongest.append(copy)
    return tuple(strongest)


def _near(copy: Copy, other: Copy) -> bool:
    """Whether they are less apart than two subjects that do not touch, along both sides."""
    down, across = abs(copy.box.top - other.box.top), abs(copy.box.left - other.box.left)
    return down <= APART * copy.box.height and across <= APART * copy.box.width
