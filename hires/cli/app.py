"""The command line: one Typer app, to which the modules beside this one add their commands."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from hires._version import __version__
from hires.cli import bench, info, render, serve, upscale

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
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    if version:
        print(f"hires {__version__}")
        raise typer.Exit


render.register(app)
info.register(app)
upscale.register(app)
serve.register(app)
bench.register(app)
if __name__ == "__main__":
    app()
