"""The documents say what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import figures as report_figures
from benchmarks.report import tables, write
from benchmarks.report.write import ROOT, drifted, redrawn

TEXT = "before\n\n<!-- report:a -->\nold\n<!-- /report -->\n\nbetween\n\n<!-- report:b -->\n<!-- /report -->\nafter\n"
BLOCKS = {"a": lambda: "| 1 |", "b": lambda: "| 2 |"}


def test_the_documents_and_figures_are_those_of_the_rows() -> None:
    """Where this fails: `python -m benchmarks report`, then look at what changed."""
    assert drifted(ROOT) == []


def test_blocks_are_replaced_and_nothing_else() -> None:
    found = redrawn(TEXT, BLOCKS)
    assert found == TEXT.replace("old\n", "\n| 1 |\n\n").replace("b -->\n", "b -->\n\n| 2 |\n\n")
    assert redrawn(found, BLOCKS) == found
    with pytest.raises(KeyError):
        redrawn(TEXT, {"a": BLOCKS["a"]})
    with pytest.raises(ValueError, match="not closed"):
        redrawn(TEXT.replace("<!-- /report -->\nafter", "after"), BLOCKS)


def test_a_changed_number_is_found(tmp_path: Path) -> None:
    """A document that was edited by hand, a figure of other rows, and one that is missing."""
    for name in write.DOCUMENTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    figures = tmp_path / write.FIGURE_FOLDER
    figures.mkdir()
    for path in (ROOT / write.FIGURE_FOLDER).glob("*.svg"):
        (figures / path.name).write_text(path.read_text())
    assert drifted(tmp_path) == []
    page = tmp_path / "docs" / "benchmarks.md"
    page.write_text(page.read_text().replace("| progressive | 1024² | 32 | 32 |", "| progressive | 1024² | 32 | 31 |"))
    strategies = figures / "strategies.svg"
    strategies.write_text(strategies.read_text().replace(report_figures.MARK, "other "))
    assert drifted(tmp_path) == ["docs/benchmarks.md", "docs/figures/strategies.svg"]


def test_a_table_without_rows_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m benchmarks upscale quality"):
        tables.rows_of("upscale_quality", tmp_path)
    text = "<!-- report:a -->\n<!-- /report -->\n"
    assert "*python*" in redrawn(text, {"a": lambda: raising("python")})


def raising(what: str) -> str:
    raise FileNotFoundError(what)


def test_figures_know_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: report_figures.Points = [{"name": "a", "x": 1.0, "y": 2.0, "of": 0.5}]
    figure = report_figures.Figure(lambda: shown, report_figures.draw_scaling, "words")
    monkeypatch.setitem(report_figures.FIGURES, "toy", figure)
    report_figures.draw("toy", tmp_path)
    first = (tmp_path / "toy.svg").read_text()
    assert report_figures.current("toy", tmp_path)
    report_figures.draw("toy", tmp_path)
    assert (tmp_path / "toy.svg").read_text() == first
    shown[0]["x"] = 3.0
    assert not report_figures.current("toy", tmp_path)
    shown.clear()
    report_figures.draw("toy", tmp_path)
    assert not (tmp_path / "toy.svg").exists() and report_figures.current("toy", tmp_path)
