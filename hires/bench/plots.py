"""Rows of `hires bench` for people, as CSV, and drawn."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from hires.bench.row import COLUMNS, Row
from hires.errors import OutputError, RequestError
from hires.units import Json


def line(row: Row) -> str:
    """A row in one line of a terminal."""
    values = row.to_json()
    head = f"{row.suite:<10}{row.case[:30]:<31}{row.way[:34]:<35}{row.size:<12}"
    if values["p50_ms"] is None:
        return head + str(values["state"])
    spread = f" ({values['p20_ms']:.4g} to {values['p80_ms']:.4g})" if row.taken.repeats > 1 else ""
    parts = [f"{values['p50_ms']:>11.3f} ms{spread}"]
    if values["tflop_per_s"]:
        parts.append(f"{values['tflop_per_s']:.3f} TFLOP/s ({100 * values['share_of_peak']:.0f} %)")
    elif values["gb_per_s"]:
        parts.append(f"{values['gb_per_s']:.2f} GB/s")
    if values["share_of_floor"]:
        parts.append(f"{1 / values['share_of_floor']:.1f} x floor")
    if values["measured_peak_mib"] is not None:
        predicted = values["predicted_peak_mib"]
        parts.append(
            f"{values['measured_peak_mib']:.0f} MiB" + (f" of {predicted:.0f} predicted" if predicted is not None else "")
        )
    if values["quality"] is not None:
        parts.append(f"{row.measure} {values['quality']:.4g}")
    return head + ", ".join(parts)


def append_csv(path: Path, rows: Sequence[Row], machine: Json) -> None:
    """Add rows, each with its machine and version, to a file. OutputError where it is another table or cannot be written."""
    columns = [*machine, *COLUMNS]
    try:
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as opened:
                if next(csv.reader(opened), None) != columns:
                    raise OutputError(f"csv {path}: has other columns; give another file")
            fresh = False
        else:
            fresh = True
        with path.open("a", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, columns)
            if fresh:
                writer.writeheader()
            writer.writerows(machine | row.to_json() for row in rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OutputError(f"csv {path}: cannot be written ({error}); give another file") from None


def check_picture(option: str, path: Path) -> None:
    """OutputError or RequestError where matplotlib cannot draw there, before any work."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise OutputError(f"{option} {path}: the name must end in .png or .svg")
    if not path.parent.is_dir():
        raise OutputError(f"{option} {path}: the folder {path.parent} does not exist; give another")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise RequestError(f"{option} {path}: needs matplotlib: pip install -e '.[plot]' in the folder of hires") from None


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Median times as bars on a logarithmic scale, each row's floor beside it, a panel per suite."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ran = [row for row in rows if row.taken.p50 is not None]
    suites = list(dict.fromkeys(row.suite for row in ran)) or ["nothing ran"]
    counts = [max(1, sum(row.suite == suite for row in ran)) for suite in suites]
    figure = Figure(figsize=(11, 1.2 * len(suites) + 0.26 * sum(counts)), layout="constrained")
    panels = figure.subplots(len(suites), 1, squeeze=False, height_ratios=counts)[:, 0]
    for suite, panel in zip(suites, panels, strict=True):
        own = [row for row in ran if row.suite == suite]
        places = range(len(own))
        panel.barh(places, [1000 * (row.taken.p50 or 0) for row in own], color="#60a5fa", label="measured")
        floors = [(place, 1000 * row.floor_seconds) for place, row in zip(places, own, strict=True) if row.floor_seconds]
        if floors:
            panel.plot(
                [floor for _, floor in floors],
                [place for place, _ in floors],
                "|",
                color="#b91c1c",
                markersize=11,
                label="floor",
            )
        panel.set_yticks(list(places), [f"{row.case}, {row.way}, {row.size}" for row in own], fontsize=7)
        panel.invert_yaxis()
        if own:
            panel.set_xscale("log")
        panel.set_xlabel("ms")
        panel.set_title(suite, loc="left", fontsize=10)
        panel.legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=10)
    canvas = FigureCanvasSVG if path.suffix.lower() == ".svg" else FigureCanvasAgg
    canvas(figure)
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"plot {path}: cannot be written ({error.strerror or error}); give another name") from None
