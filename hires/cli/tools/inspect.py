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
    from hires.checkpoints.inspect import inspect as inspected

    found = guarded(lambda: inspected(name, family=family, parts=parts))
    print(json.dumps(found.to_json()) if as_json else in_flags(found.explain(), report=True))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)
