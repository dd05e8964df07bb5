"""`hires jobs`: unfinished renders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hires.cli.display import guarded
from hires.cli.options import AsJson
from hires.units import gib


def jobs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the outputs are.", show_default=False)] = Path(),
    clean: Annotated[bool, typer.Option("--clean", help="Remove those that no process works on.")] = False,
    as_json: AsJson = False,
) -> None:
    """List unfinished renders, which the same command goes on with, or remove what is kept of them."""
    from hires.resume import unfinished

    unfinished_jobs = guarded(lambda: unfinished.unfinished(folder))
    removed = unfinished.clean(unfinished_jobs) if clean else []
    if as_json:
        document = {"jobs": [job.to_json() for job in unfinished_jobs], "removed": [job.output for job in removed]}
        print(json.dumps(document))
        return
    for job in unfinished_jobs:
        state = "removed" if job in removed else job.progress
        age = f"{job.age_seconds / 60:.0f} min ago"
        print(f"{job.output}  {job.size}  {state}  {age}  {gib(job.held_bytes)}  {job.prompt[:60]}")
    if not unfinished_jobs:
        print(f"nothing unfinished in {folder.resolve()}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(jobs)
