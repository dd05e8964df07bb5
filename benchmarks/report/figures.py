"""Figures from rows, as SVG; each holds a digest of what it shows, by which it is known to be current."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report.tables import oracle_rows, rows_of
from benchmarks.rows import STATE, newest
from benchmarks.suites import scaling, waterfall

Points = list[dict[str, Any]]
MARK = "rows "


def waterfall_points() -> Points:
    """Every step: its name, seconds and peak; of one that did not end what is said of it, at the limit."""
    rows = waterfall.in_order(newest(rows_of("waterfall"), waterfall.SUITE.key))
    most = max(int(row["side"]) for row in rows)
    shown, limit = [row for row in rows if int(row["side"]) == most], waterfall.SUITE.limit_s
    return [
        {"name": r["step"], "x": float(r["seconds"]), "y": float(r["peak_rss_gib"])}
        if r[STATE] == "ran"
        else {"name": r["step"], "x": limit if r[STATE] == waterfall.STOPPED else 0.0, "y": 0.0, "of": r[STATE]}
        for r in shown
    ]


def scaling_points() -> Points:
    """Seconds of every part over pixels, the attention's apart."""
    rows = newest(rows_of("scaling"), scaling.SUITE.key)
    ran = [row for row in rows if row[STATE] == "ran"]
    return [
        {"name": r["part"], "x": float(r["side"]) ** 2 / 1e6, "y": float(r["p50_s"]), "of": float(r["attention_s"])}
        for r in ran
    ]


def vae_points() -> Points:
    """Seconds and peak of every way to decode, per size, as the suite `vae` measured them."""
    rows = newest(rows_of("vae"), ("side", "way"))
    return [
        {"name": r["way"], "x": float(r["seconds"]), "y": float(r["peak_mib"]), "of": r["side"].partition("x")[0]} for r in rows
    ]


def strategy_points() -> Points:
    """Duplicates, work and detail of every strategy on the oracle."""
    values = [(r["strategy"], r["relay_sigma"], r["duplicates"], r["windows"], r["detail"]) for r in oracle_rows()]
    return [
        {"name": f"{name} from {sigma}" if sigma else name, "x": float(duplicates), "y": float(windows), "of": float(detail)}
        for name, sigma, duplicates, windows, detail in values
    ]


def draw_waterfall(axes: Any, points: Points) -> None:
    """A bar without filling is of a step that did not end."""
    names = [point["name"] for point in points]
    filled = ["none" if "of" in point else "#4c72b0" for point in points]
    bars = axes.barh(names, [point["x"] for point in points], color=filled, edgecolor="#4c72b0")
    axes.bar_label(bars, [p.get("of") or f"{p['x']:.0f} s, {p['y']:.2f} GiB" for p in points], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.set_xlabel("seconds of one render, and its peak memory")


def draw_scaling(axes: Any, points: Points) -> None:
    for name in dict.fromkeys(point["name"] for point in points):
        own = [point for point in points if point["name"] == name]
        line = axes.plot([p["x"] for p in own], [p["y"] for p in own], marker="o", label=name)[0]
        if any(p["of"] for p in own):
            rest = [p["y"] - p["of"] for p in own]
            axes.plot([p["x"] for p in own], rest, ":", color=line.get_color(), label=f"{name}, without attention")
    axes.set(xscale="log", yscale="log", xlabel="megapixels", ylabel="seconds")
    axes.legend(fontsize=8)


def draw_vae(axes: Any, points: Points) -> None:
    """Colours are ways, marks are sizes."""
    marks = dict(zip(dict.fromkeys(point["of"] for point in points), "os^D", strict=False))
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(point["name"] for point in points))}
    for point in points:
        axes.plot(point["x"], point["y"], marks[point["of"]], color=colours[point["name"]], alpha=0.8)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for side, mark in marks.items():
        axes.plot([], [], mark, color="white", markeredgecolor="black", label=f"{side}²")
    axes.set(xlim=0, ylim=0, xlabel="seconds", ylabel="peak, MiB")
    axes.legend(fontsize=8, loc="lower right")


def draw_strategies(axes: Any, points: Points) -> None:
    bars = axes.barh([point["name"] for point in points], [point["x"] for point in points], color="#c44e52")
    axes.bar_label(bars, [f"{p['x']:.2g}, {p['y']:.0f} windows, detail {p['of']:.2f}" for p in points], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.5)
    axes.set_xlabel("duplicates per picture (none is right), and what it cost")


@dataclass(frozen=True, slots=True)
class Figure:
    """points: what it shows; draw: onto axes; says: in words, for who does not see it."""

    points: Callable[[], Points]
    draw: Callable[[Any, Points], None]
    says: str


FIGURES = {
    "waterfall": Figure(waterfall_points, draw_waterfall, "Seconds and peak memory of one render from naive to ours"),
    "scaling": Figure(scaling_points, draw_scaling, "Seconds over megapixels, on logarithmic axes"),
    "vae": Figure(vae_points, draw_vae, "Peak memory over seconds of every way to decode, at each size"),
    "strategies": Figure(strategy_points, draw_strategies, "Duplicates of every strategy on the oracle, and its cost"),
}


def points_of(name: str) -> Points:
    """What a figure shows; nothing where there are no rows yet."""
    try:
        return FIGURES[name].points()
    except FileNotFoundError:
        return []


def digest_of(points: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()[:16]


def current(name: str, folder: Path) -> bool:
    """Whether the file shows the rows that there are: without rows there is none."""
    points, path = points_of(name), folder / f"{name}.svg"
    if not points:
        return not path.exists()
    return path.exists() and f"{MARK}{digest_of(points)}" in path.read_text()


def draw(name: str, folder: Path) -> None:
    """The figure as an SVG, drawn anew only where its rows are others: drawings differ between versions of matplotlib."""
    if current(name, folder):
        return
    points, path = points_of(name), folder / f"{name}.svg"
    if not points:
        path.unlink(missing_ok=True)
        return
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "hires", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        FIGURES[name].draw(axes, points)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Description": f"{MARK}{digest_of(points)}"})
        pyplot.close(figure)
