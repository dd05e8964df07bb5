"""`hires measure`: measures of a finished image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hires._version import __version__
from hires.cli.display import guarded
from hires.cli.options import AsJson

if TYPE_CHECKING:
    from hires.metrics.measures import Measures


def measure(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture to measure.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option("--base", metavar="FILE", help="The small picture that it was drawn from.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option("--grid", metavar="TILE:OVERLAP", help="Its tiles in px, such as 1024:256; default: the plan in the PNG."),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.png", help="Draw the measures into a PNG; overwritten.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a picture: contrast, detail beyond its base, seams against random grids, drift, duplicates."""
    from hires.metrics import measure_file

    def work() -> Measures:
        from hires.errors import OutputError
        from hires.images.whole import check_png, save_png

        target = None if report_file is None else check_png(report_file, overwrite=True)
        if target is not None and target.resolve() in (file.resolve(), file if base is None else base.resolve()):
            raise OutputError(f"--report {target}: is a picture to be measured; give another name")
        measures, source = measure_file.measure_and_keep(file, base, grid)
        if target is not None:
            from hires.metrics.report_picture import report as drawn

            save_png(target, drawn(file.name, source, measures), {"Software": f"hires {__version__}"}, overwrite=True)
        return measures

    measures = guarded(work)
    print(json.dumps(measures.to_json()) if as_json else measures.explain(str(file)))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(measure)
