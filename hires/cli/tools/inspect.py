"""`hires inspect`: what a checkpoint is, and how to run it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hires.cli.display import guarded, in_flags
from hires.cli.options import AsJson, Family, Parts


def inspect(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A file, a folder, or org/name on the hub.", show_default=False)],
    family: Family = None,
    parts: Parts = None,
    as_json: AsJson = False,
) -> None:
    """Print what a checkpoint, LoRA or autoencoder is and why, what it holds, what it lacks, and how to run it."""
    from hires.checkpoints import inspect as report

    document = guarded(lambda: report.inspect(name, family=family, parts=parts))
    print(json.dumps(document) if as_json else in_flags("\n".join(report.lines(document)), report=True))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)
