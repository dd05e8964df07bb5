"""A plan's drawing says what the plan says: every tile, every stage's bar at its length, budgets that do not fit as such."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hires.checkpoints.model import ModelSpec
from hires.devices.machines import described_card
from hires.errors import OutputError
from hires.options.render import RenderRequest
from hires.planning.drawing import bars, grid_lines, other_budgets, save_drawing, svg, table, terminal
from hires.planning.page import shapes
from hires.planning.plan import MemoryPlan
from hires.planning.planner import plan
from hires.tiling.geometry import Size, make_grid
from hires.units import gib, parse_bytes
from tests.planning.test_search import full_size

NAMESPACE = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(demo: ModelSpec) -> MemoryPlan:
    request = RenderRequest(prompt="", size=Size(2160, 3840), attention_policy="global")
    return plan(request, full_size(demo, "cosxl"), described_card(parse_bytes("12GB")))


def test_the_bars_are_as_long_as_the_peaks(made: MemoryPlan) -> None:
    for line, cost in zip(bars(made, 100), made.costs, strict=True):
        assert abs(line.count("█") - 100 * cost.peak_bytes / made.budget_bytes) <= 1
        assert line.count("█") + line.count("░") == 100 and cost.stage in line and gib(cost.peak_bytes) in line


def test_the_characters_count_the_tiles_of_a_place() -> None:
    lines = grid_lines(make_grid(Size(48, 80), Size(32, 32), 16))
    assert lines[0] == "  4 x 2 tiles of 32x32 cells on 80x48; a digit: so many overlap"
    drawn = [line[2:] for line in lines[1:]]
    assert len({len(line) for line in drawn}) == 1
    assert drawn[0][0] == drawn[-1][-1] == "·" and max("".join(drawn).replace("·", "1")) == "4"
    assert grid_lines(make_grid(Size(48, 80), Size(48, 80), 0)) == ["  one tile of 80x48 cells covers the canvas"]


def test_the_svg_has_a_rectangle_for_every_tile_and_bar(made: MemoryPlan, tmp_path: Path) -> None:
    root = ElementTree.fromstring(svg(made))
    assert len(root.findall(f"{NAMESPACE}g[@stroke]/{NAMESPACE}rect")) == made.latent_grid.count
    assert len(root.findall(f"{NAMESPACE}rect")) == len(made.costs) + 2  # the page, and the budget's line
    texts = " ".join(t.text or "" for t in root.findall(f"{NAMESPACE}text"))
    assert all(cost.stage in texts for cost in made.costs) and "3840x2160" in texts
    for name in ("plan.svg", "plan.png"):
        save_drawing(made, tmp_path / name)
    assert (tmp_path / "plan.svg").read_text() == svg(made)
    picture = Image.open(tmp_path / "plan.png").convert("RGB")
    assert picture.width == int(root.get("width") or 0) and len(set(picture.getdata())) > 5
    with pytest.raises(OutputError, match=r"must end in \.svg or \.png"):
        save_drawing(made, tmp_path / "plan.jpg")
    with pytest.raises(OutputError, match="cannot be written"):
        save_drawing(made, tmp_path / "nowhere" / "plan.svg")


def test_a_notebook_shows_the_drawing_and_a_terminal_one_line(made: MemoryPlan) -> None:
    assert made._repr_svg_() == made.svg() == svg(made)
    assert made._repr_mimebundle_() == {"image/svg+xml": made.svg(), "text/plain": made.explain()}
    assert repr(made).startswith(f"<hires.MemoryPlan 3840x2160 with {made.model}, progressive, ") and len(repr(made)) < 160
    assert gib(made.peak_bytes) in repr(made)
    again = replace(made)
    assert again == made and hash(again) == hash(made) and replace(made, batch=made.batch + 1) != made


@pytest.mark.parametrize("name", ["a" * 300, '<script>"&amp;'])
def test_a_title_of_any_kind_stays_on_the_page(made: MemoryPlan, name: str) -> None:
    drawn = ElementTree.fromstring(replace(made, model=name).svg())
    title = drawn.findtext(f"{NAMESPACE}text") or ""
    assert name[:10] in title and len(title) <= 96


def test_one_tile_takes_little_of_the_page_and_many_have_fine_lines(made: MemoryPlan) -> None:
    def drawn(cells: int, tile: int) -> tuple[int, float]:
        grid = make_grid(Size(cells, cells), Size(tile, tile), tile // 4)
        shapes_, height = shapes(replace(made.page(), grid=grid))
        return height, max(shape.line for shape in shapes_)

    assert drawn(128, 128) < drawn(128, 64)
    assert drawn(128, 64)[1] == 1 > drawn(1024, 16)[1] > 0


def test_other_budgets_name_what_changes(demo: ModelSpec) -> None:
    spec, request = full_size(demo, "cosxl"), RenderRequest(prompt="", size=Size(8192, 8192), attention_policy="npa")
    found = other_budgets(lambda budget: plan(request, spec, described_card(budget)))
    assert [budget.plan is None for budget in found] == [True, False, False, False, False]
    lines = table(found).splitlines()
    assert "budget 7.45 GiB" in lines[1] and "layers" in lines[2] and lines[5].split()[0] == "48"
    seconds = [budget.plan.seconds for budget in found if budget.plan is not None]
    assert seconds == sorted(seconds, reverse=True), "a larger card is never slower"


def test_the_terminal_shows_bars_and_tiles(made: MemoryPlan) -> None:
    text = terminal(made)
    assert text.count("█") > 10 and "tiles of 128x128 cells" in text
