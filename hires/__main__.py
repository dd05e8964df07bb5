"""`python -m hires`: the command line."""

from hires.cli.app import app

app(prog_name="hires")
