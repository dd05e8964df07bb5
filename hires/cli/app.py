"""The command line: one app, whose commands the other files of this room add."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from hires._version import __version__
from hires.cli import render, serve, upscale
from hires.cli.tools import bench, info, inspect, jobs, measure, vae_roundtrip

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Render 2K to 8K pictures and larger with diffusion models, planned before they run.",
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what happens to stderr.")] = False,
) -> None:
    """The options that stand before a command."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if version:
        print(f"hires {__version__}")
        raise typer.Exit


for _command in (render, inspect, measure, vae_roundtrip, jobs, info, upscale, serve, bench):
    _command.register(app)
