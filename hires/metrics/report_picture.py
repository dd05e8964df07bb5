"""Draws the report of `hires measure` as one picture.

The picture with its tiles, its spectrum, tones and numbers. Imports Pillow only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hires.images.boxes import BoxSource, Doubles, averaged
from hires.metrics.contrast import LOWEST, PER_OCTAVE, Contrast
from hires.metrics.measures import Measures, Row, marks, rows_of
from hires.metrics.seams import seam_lines
from hires.tiling.geometry import Size

WIDTH, MARGIN, GAP = 1480, 48, 40
THUMB = Size(660, 660)
INK, QUIET, FAINT, OWN, OTHER, ALARM = "#1d2329", "#66707a", "#d9dee3", "#1261a6", "#a3acb5", "#c2410c"
STOPS = 14  # octaves below white that the tones are drawn for
BARS = 8  # per octave


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """A plot's frame (left, top, right, bottom) in px and the ranges drawn in it, linear."""

    frame: tuple[int, int, int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The place (x, y) in px of a value, held to the frame."""
        left, top, right, bottom = self.frame
        across = left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)
        down = bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top)
        return min(max(across, left), right), min(max(down, top), bottom)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that is drawn with, at a size in px."""
    return ImageFont.load_default(size)


def report(name: str, source: BoxSource, measures: Measures) -> NDArray[np.uint8]:
    """The report as (H, W, 3) uint8 pixels."""
    rows = rows_of(measures)
    top = 112
    thumb = thumbnail(source, measures)
    body = THUMB.height
    table_top = top + body + GAP
    sheet = Image.new("RGB", (WIDTH, table_top + 30 * len(rows) + 24 * len(measures.notes) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    depth = f"{measures.bits} bits" if measures.bits else "floats"
    pen.text((MARGIN, 30), _fitting(pen, name, font(30), WIDTH - 2 * MARGIN), fill=INK, font=font(30))
    pen.text((MARGIN, 72), f"{measures.size}, {depth} per channel", fill=QUIET, font=font(18))
    sheet.paste(thumb, (MARGIN, top))
    left, right = MARGIN + THUMB.width + GAP + 36, WIDTH - MARGIN
    middle = top + body // 2
    _spectrum(pen, measures, (left, top + 34, right, middle - 62))
    _tones(pen, measures.contrast, (left, middle + 50, right, top + body - 46))
    _table(pen, rows, table_top, measures.notes)
    return np.asarray(sheet)


def _fitting(pen: ImageDraw.ImageDraw, text: str, with_font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, its beginning cut where it is too long."""
    while pen.textlength(text, font=with_font) > width and len(text) > 8:
        text = "…" + text[max(2, len(text) // 20) :]
    return text


def thumbnail(source: BoxSource, measures: Measures) -> Image.Image:
    """The picture averaged down into `THUMB`, the edges of its tiles drawn over it, duplicates of its subject framed."""
    size = source.size
    by = min(1.0, THUMB.height / size.height, THUMB.width / size.width)
    small = Size(max(1, round(size.height * by)), max(1, round(size.width * by)))
    picture = Image.fromarray(np.rint(averaged(source, small) * 255).astype(np.uint8))
    if min(THUMB.height / small.height, THUMB.width / small.width) >= 2:
        times = int(min(THUMB.height / small.height, THUMB.width / small.width))
        picture = picture.resize((small.width * times, small.height * times), Image.Resampling.NEAREST)
    scale = picture.height / size.height, picture.width / size.width
    pen = ImageDraw.Draw(picture, "RGBA")
    if measures.tiles is not None:
        lines = seam_lines(measures.tiles.grid, 1)
        _grid(pen, picture, [[line * by for line in axis] for axis, by in zip(lines, scale, strict=True)])
    for copy in () if measures.duplicates is None else measures.duplicates.copies:
        box = copy.box
        corners = (box.left * scale[1], box.top * scale[0], box.right * scale[1], box.bottom * scale[0])
        pen.rectangle(corners, outline=ALARM, width=2)
    return picture


def _grid(pen: ImageDraw.ImageDraw, picture: Image.Image, lines: Sequence[Sequence[float]]) -> None:
    """Thin lines, light beside dark so that they are seen on anything."""
    for offset, colour in ((0, (255, 255, 255, 120)), (1, (0, 0, 0, 90))):
        for row in lines[0]:
            pen.line((0, round(row) + offset, picture.width, round(row) + offset), fill=colour)
        for col in lines[1]:
            pen.line((round(col) + offset, 0, round(col) + offset, picture.height), fill=colour)


def _spectrum(pen: ImageDraw.ImageDraw, measures: Measures, frame: tuple[int, int, int, int]) -> None:
    frequency, power = measures.spectrum.radial()
    curves = [(power, OWN, "picture")]
    if measures.enlarged is not None:
        curves.insert(0, (measures.enlarged.radial()[1], OTHER, "base enlarged by Lanczos"))
    heights = np.log10(np.maximum(np.concatenate([curve for curve, _, _ in curves]), 1e-14))
    low, high = math.floor(heights.min()), math.ceil(heights.max())
    axes = Axes(frame=frame, x=(math.log2(frequency[0]), -1.0), y=(max(low, high - 9), max(high, low + 1)))
    _title(pen, frame, "Power over frequency, radial mean", [(label, colour) for _, colour, label in reversed(curves)])
    for octave in range(math.ceil(axes.x[0]), 0):
        _vertical(pen, axes, octave, f"1/{2**-octave}")
    decades = range(int(axes.y[0]), int(axes.y[1]) + 1)
    for decade in decades[:: 1 + len(decades) // 6]:
        _horizontal(pen, axes, decade, f"1e{decade}")
    if measures.detail is not None:
        x, y = axes.at(math.log2(measures.detail.cutoff), axes.y[1])
        pen.line((x, y, x, frame[3]), fill=ALARM, width=2)
        label = f"Nyquist of the base, {measures.detail.base}"
        wide = pen.textlength(label, font=font(14))
        pen.text((x + 6 if x + 6 + wide < frame[2] else x - 6 - wide, y + 2), label, fill=ALARM, font=font(14))
    for curve, colour, _ in curves:
        heights = np.log10(np.maximum(curve, 1e-14))
        pen.line(
            [axes.at(math.log2(f), h) for f, h in zip(frequency, heights, strict=True)], fill=colour, width=2, joint="curve"
        )
    pen.text((frame[2], frame[3] + 24), "cycles per pixel", fill=QUIET, font=font(14), anchor="ra")


def tone_shares(tones: Contrast) -> Doubles:
    """Shares of all pixels per 1 / BARS of an octave, from `STOPS` below white up; the first holds all that is darker."""
    per_bar, first = PER_OCTAVE // BARS, 1 + (-LOWEST - STOPS) * PER_OCTAVE
    counts = tones.histogram.astype(np.float64)
    bars = counts[first : first + STOPS * PER_OCTAVE].reshape(-1, per_bar).sum(1)
    bars[0] += counts[:first].sum()
    bars[-1] += counts[first + STOPS * PER_OCTAVE :].sum()
    shares: Doubles = bars / counts.sum()
    return shares


def _tones(pen: ImageDraw.ImageDraw, tones: Contrast, frame: tuple[int, int, int, int]) -> None:
    shares = tone_shares(tones)
    axes = Axes(frame=frame, x=(-STOPS, 0.0), y=(0.0, float(shares.max())))
    _title(pen, frame, "Tones, share of pixels over stops below white", [])
    for stop in range(-STOPS, 1, 2):
        _vertical(pen, axes, stop, f"{stop}")
    for index, share in enumerate(shares):
        x0, y0 = axes.at(index / BARS - STOPS, float(share))
        x1, _ = axes.at((index + 1) / BARS - STOPS, 0)
        if share > 0:
            pen.rectangle((x0, min(y0, frame[3] - 1), x1 - 1, frame[3]), fill=OWN)
    for value, label, anchor in ((tones.dark, "P0.1", "la"), (tones.bright, "P99.9", "ra")):
        x, y = axes.at(math.log2(value) if value > 0 else -STOPS, axes.y[1])
        pen.line((x, y, x, frame[3]), fill=ALARM, width=2)
        pen.text((x + (6 if anchor == "la" else -6), y + 2), label, fill=ALARM, font=font(14), anchor=anchor)
    sign = "at least " if tones.at_least else ""
    words = f"{sign}{tones.ratio:.4g}:1, {marks(tones)}"
    pen.text((frame[2], frame[3] + 24), words, fill=INK, font=font(14), anchor="ra")


def _title(pen: ImageDraw.ImageDraw, frame: tuple[int, int, int, int], title: str, legend: list[tuple[str, str]]) -> None:
    pen.text((frame[0] - 36, frame[1] - 32), title, fill=INK, font=font(18))
    x = float(frame[2])
    for label, colour in legend:
        x -= pen.textlength(label, font=font(14))
        pen.text((x, frame[1] - 28), label, fill=colour, font=font(14))
        x -= 18
    pen.line((frame[0], frame[3], frame[2], frame[3]), fill=QUIET)


def _vertical(pen: ImageDraw.ImageDraw, axes: Axes, x: float, label: str) -> None:
    across, _ = axes.at(x, axes.y[0])
    pen.line((across, axes.frame[1], across, axes.frame[3] - 1), fill=FAINT)
    pen.text((across, axes.frame[3] + 6), label, fill=QUIET, font=font(13), anchor="ma")


def _horizontal(pen: ImageDraw.ImageDraw, axes: Axes, y: float, label: str) -> None:
    _, down = axes.at(axes.x[0], y)
    pen.line((axes.frame[0], down, axes.frame[2], down), fill=FAINT)
    pen.text((axes.frame[0] - 6, down), label, fill=QUIET, font=font(13), anchor="rm")


def _table(pen: ImageDraw.ImageDraw, rows: Sequence[Row], top: int, notes: Sequence[str]) -> None:
    for index, row in enumerate(rows):
        y = top + 30 * index
        pen.line((MARGIN, y, WIDTH - MARGIN, y), fill=FAINT)
        colour = ALARM if row.alarm else QUIET if row.value == "-" else INK
        inset = 20 if row.name.startswith(" ") else 0
        pen.text((MARGIN + inset, y + 6), row.name.strip(), fill=INK, font=font(16))
        pen.text((MARGIN + 360, y + 6), row.value, fill=colour, font=font(16), anchor="ra")
        pen.text((MARGIN + 390, y + 6), row.remark, fill=QUIET, font=font(16))
    for index, note in enumerate(notes):
        pen.text((MARGIN, top + 30 * len(rows) + 8 + 24 * index), f"note: {note}", fill=QUIET, font=font(15))
