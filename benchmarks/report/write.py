"""Redraw the tables and figures of the README and of docs/ from the rows in benchmarks/results.

    python -m benchmarks report            # write them
    python -m benchmarks report --check    # exit code 1 where they are not those of the rows

A document holds `<!-- report:NAME -->`, the table, `<!-- /report -->`, each on a line of its own; what is between is replaced.
A figure holds a digest of its rows. A table whose rows are not there yet says which command makes them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.figures import FIGURES, current, draw, points_of
from benchmarks.report.tables import BLOCKS

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    Path("README.md"),
    Path("docs/benchmarks.md"),
    Path("docs/guide/few-step.md"),
    Path("docs/guide/relay-and-stages.md"),
    Path("docs/options.md"),
)
FIGURE_FOLDER = Path("docs/figures")
BLOCK = re.compile(r"(?P<head>^<!-- report:(?P<name>[\w-]+) -->\n).*?(?P<tail>^<!-- /report -->$)", re.DOTALL | re.MULTILINE)


def pictured(name: str) -> Callable[[], str]:
    """The link to a figure, where there are rows for it."""

    def link() -> str:
        if not points_of(name):
            raise FileNotFoundError(f"no rows yet for the figure: python -m benchmarks {name}")
        return f"![{FIGURES[name].says}](figures/{name}.svg)"

    return link


ALL_BLOCKS = BLOCKS | {f"figure-{name}": pictured(name) for name in FIGURES}


def redrawn(text: str, blocks: dict[str, Callable[[], str]] = ALL_BLOCKS) -> str:
    """A document with every block as its rows say. KeyError for a name that no table has; an unclosed block is a ValueError."""
    if text.count("<!-- report:") != len(BLOCK.findall(text)):
        raise ValueError("a block is not closed by <!-- /report --> on a line of its own")
    return BLOCK.sub(lambda found: found["head"] + filled(found["name"], blocks) + found["tail"], text)


def filled(name: str, blocks: dict[str, Callable[[], str]]) -> str:
    """The lines of a block: an empty one around a table, so that it is one."""
    try:
        return f"\n{blocks[name]()}\n\n"
    except FileNotFoundError as absent:
        return f"\n*{absent}*\n\n"


def drifted(root: Path) -> list[str]:
    """Documents and figures that are not as the rows say."""
    texts = {name: (root / name).read_text() for name in DOCUMENTS}
    found = [str(name) for name, text in texts.items() if redrawn(text) != text]
    return found + [f"{FIGURE_FOLDER / name}.svg" for name in FIGURES if not current(name, root / FIGURE_FOLDER)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something differs")
    args = parser.parse_args(argv)
    if args.check:
        differing = drifted(ROOT)
        for differs in differing:
            print(f"{differs}: not as the rows in benchmarks/results say; run `python -m benchmarks report`", file=sys.stderr)
        return 1 if differing else 0
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text()
        path.write_text(redrawn(text))
    for figure in FIGURES:
        draw(figure, ROOT / FIGURE_FOLDER)
    return 0
