"""Draws a plan: its tiles, and its stages' peaks against the budget.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hires.errors import BudgetError, OutputError
from hires.planning.page import INK, WIDTH, shapes
from hires.planning.plan import MemoryPlan
from hires.tiling.geometry import TileGrid
from hires.units import gib

if TYPE_CHECKING:
    from PIL import Image

COLUMNS, ROWS = 64, 20  # of the terminal's drawing, at most
BUDGETS_GB = (8, 12, 16, 24, 48)


def terminal(plan: MemoryPlan) -> str:
    """The last stage's tiles and the bars, in characters."""
    return "\n".join([*bars(plan), "", *grid_lines(plan.latent_grid)])


def bars(plan: MemoryPlan, width: int = 40) -> list[str]:
    """A line per stage: name, bar of its predicted peak against the budget, bytes, seconds."""
    lines = []
    for cost in plan.costs:
        share = min(1.0, cost.peak_bytes / plan.budget_bytes)
        filled = max(1, round(share * width)) if cost.peak_bytes else 0
        bar = "█" * filled + "░" * (width - filled)
        lines.append(f"  {cost.stage:<10} {bar} {gib(cost.peak_bytes):>10} of {gib(plan.budget_bytes)}, {cost.seconds:.0f} s")
    return lines


def grid_lines(grid: TileGrid) -> list[str]:
    """How many tiles cover each place: '·' one, a digit where tiles overlap; a character is a rectangle of cells."""
    if grid.count == 1:
        return [f"  one tile of {grid.tile} cells covers the canvas"]
    height, width = grid.canvas.height, grid.canvas.width
    scale = max(width / COLUMNS, height / ROWS / 2)  # a character is twice as high as wide
    columns, rows = max(1, round(width / scale)), max(1, round(height / scale / 2))

    def covered(starts: Sequence[int], tile: int, extent: int, count: int) -> list[int]:
        centres = [(i + 0.5) * extent / count for i in range(count)]
        return [sum(start <= centre < start + tile for start in starts) for centre in centres]

    down = covered(grid.tops, grid.tile.height, height, rows)
    across = covered(grid.lefts, grid.tile.width, width, columns)
    drawn = ["  " + "".join("·" if a * b == 1 else str(min(9, a * b)) for b in across) for a in down]
    shape = f"{len(grid.lefts)} x {len(grid.tops)} tiles of {grid.tile} cells on {grid.canvas}; a digit: so many overlap"
    return [f"  {shape}", *drawn]


@dataclass(frozen=True, slots=True)
class Budget:
    """What a plan would be with another budget; `plan` is None where nothing fits, and `why` says so."""

    budget_bytes: int
    plan: MemoryPlan | None
    why: str = ""


def other_budgets(make: Callable[[int], MemoryPlan]) -> list[Budget]:
    """A request on cards of the usual sizes; `make(bytes)` plans for one."""
    budgets = []
    for size in BUDGETS_GB:
        try:
            budgets.append(Budget(size * 10**9, make(size * 10**9)))
        except BudgetError as error:
            budgets.append(Budget(size * 10**9, None, str(error)))
    return budgets


def table(budgets: Sequence[Budget]) -> str:
    """A line per budget: seconds, peak, pictures at once, where weights are, how it decodes."""
    lines = ["  budget   seconds       peak  at once  weights     decode"]
    for budget in budgets:
        size, plan = f"{budget.budget_bytes / 1e9:.0f} GB", budget.plan
        if plan is None:
            lines.append(f"  {size:>6}  {budget.why}")
            continue
        lines.append(
            f"  {size:>6}  {plan.seconds:>8.0f}  {gib(plan.peak_bytes):>9}  {plan.batch:>7}  {plan.offload:<10}  {plan.decode}"
        )
    return "\n".join(lines)


def svg(plan: MemoryPlan) -> str:
    """The plan's page as an SVG document."""
    return plan.svg()


def save_drawing(plan: MemoryPlan, path: Path) -> None:
    """Write the page as .svg or .png. OutputError for another name, or where the file cannot be written."""
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise OutputError(f"drawing {path}: the name must end in .svg or .png")
    try:
        if suffix == ".svg":
            path.write_text(plan.svg(), encoding="utf-8")
        else:
            picture(plan).save(path)
    except OSError as error:
        raise OutputError(f"drawing {path}: cannot be written ({error.strerror or error}); give another name") from None


def picture(plan: MemoryPlan) -> Image.Image:
    """The page as a Pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    drawn, height = shapes(plan.page())
    page = Image.new("RGBA", (WIDTH, height), "white")
    for shape in drawn:
        layer = Image.new("RGBA", page.size, (0, 0, 0, 0))
        pen = ImageDraw.Draw(layer)
        if shape.text:
            pen.text((shape.x, shape.y), shape.text, fill=shape.fill, font=ImageFont.load_default(shape.size))
        else:
            box = (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)
            outline = _rgba(INK, shape.line) if shape.line else None
            pen.rectangle(box, fill=_rgba(shape.fill, shape.opacity), outline=outline)
        page = Image.alpha_composite(page, layer)
    return page.convert("RGB")


def _rgba(colour: str, opacity: float) -> tuple[int, int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue, round(255 * opacity)
