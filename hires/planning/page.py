"""The page that shows a plan: the peaks of its stages against the budget, and the tiles of the last one.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from hires.tiling.geometry import TileGrid
from hires.units import gib

INK, TILE, BAR, OVER = "#1f2937", "#60a5fa", "#34d399", "#ef4444"
WIDTH, MARGIN, LINE = 880, 24, 22
BARS_AT, LONGEST_BAR, AMOUNTS_AT = MARGIN + 110, 420, MARGIN + 545
TALLEST_GRID, TALLEST_TILE = 560, 160
LONGEST_TITLE = 96  # characters that the page is wide
FINE_PX = 40  # tiles that are smaller get finer lines, or nothing else would be seen of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One stage's line on the page."""

    stage: str
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What stands on the page, from top to bottom."""

    title: str
    bars: tuple[Bar, ...]
    budget_bytes: int
    facts: str
    """The line under the bars."""
    caption: str
    """The line over the tiles."""
    grid: TileGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A rectangle, or a text where `text` is given, in pixels of the drawing; `fill` of rrggbb, `opacity` 0 to 1."""

    x: float
    y: float
    width: float = 0
    height: float = 0
    fill: str = INK
    opacity: float = 1.0
    line: float = 0.0
    """The width of its outline; 0 for none."""
    text: str = ""
    size: int = 14


def shapes(page: Page) -> tuple[list[Shape], int]:
    """Everything on the page, and the page's height."""
    title = page.title if len(page.title) <= LONGEST_TITLE else f"{page.title[: LONGEST_TITLE - 1]}…"
    top = MARGIN + 2 * LINE
    end = top + LINE * len(page.bars)
    first, scale = end + 3 * LINE + 4, _scale(page.grid)
    drawn = [
        Shape(x=MARGIN, y=MARGIN, text=title, size=16),
        *_bars(page, top),
        Shape(x=MARGIN, y=end + 4, text=page.facts),
        Shape(x=MARGIN, y=first - LINE - 4, text=page.caption),
        *_tiles(page.grid, first, scale),
    ]
    return drawn, int(first + page.grid.canvas.height * scale + MARGIN)


def _bars(page: Page, top: float) -> Iterator[Shape]:
    most = max([page.budget_bytes, *(bar.peak_bytes for bar in page.bars)])
    for index, bar in enumerate(page.bars):
        y = top + LINE * index
        fill = BAR if bar.peak_bytes <= page.budget_bytes else OVER
        yield Shape(x=MARGIN, y=y, text=bar.stage)
        yield Shape(x=BARS_AT, y=y, width=LONGEST_BAR * bar.peak_bytes / most, height=LINE - 8, fill=fill)
        yield Shape(x=AMOUNTS_AT, y=y, text=f"{gib(bar.peak_bytes)}, {bar.seconds:.{0 if bar.seconds >= 10 else 1}f} s")
    at = BARS_AT + LONGEST_BAR * page.budget_bytes / most
    yield Shape(x=at, y=top - 4, width=2, height=LINE * len(page.bars) + 4, fill=OVER)


def _scale(grid: TileGrid) -> float:
    """Pixels of the drawing per cell."""
    tallest = TALLEST_GRID if grid.count > 1 else TALLEST_TILE  # one tile is soon seen
    return min((WIDTH - 2 * MARGIN) / grid.canvas.width, tallest / grid.canvas.height)


def _tiles(grid: TileGrid, top: float, scale: float) -> Iterator[Shape]:
    line = min(1.0, min(grid.tile.height, grid.tile.width) * scale / FINE_PX)
    for box in grid.boxes():
        x, y = MARGIN + box.left * scale, top + box.top * scale
        yield Shape(x=x, y=y, width=box.width * scale, height=box.height * scale, fill=TILE, opacity=0.25, line=line)


def svg(page: Page) -> str:
    """The page as an SVG document."""
    drawn, height = shapes(page)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">']
    parts.append(f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>')
    tiles = [shape for shape in drawn if shape.line]
    parts += [_text(shape) if shape.text else _rectangle(shape, _style(shape)) for shape in drawn if not shape.line]
    if tiles:  # said once for all: there may be thousands
        parts += [f"<g {_style(tiles[0])}>", *map(_rectangle, tiles), "</g>"]
    return "\n".join([*parts, "</svg>"])


def _text(shape: Shape) -> str:
    place = f'x="{shape.x:.1f}" y="{shape.y + shape.size:.1f}" font-size="{shape.size}" fill="{shape.fill}"'
    return f'<text {place} font-family="sans-serif">{escape(shape.text)}</text>'


def _rectangle(shape: Shape, style: str = "") -> str:
    place = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
    return f"<rect {place}{style and ' '}{style}/>"


def _style(shape: Shape) -> str:
    line = f' stroke="{INK}" stroke-width="{shape.line:.2f}"' if shape.line else ""
    return f'fill="{shape.fill}" fill-opacity="{shape.opacity:g}"{line}'
