"""`python -m hires`: the command line."""

from hires.cli import app

app(prog_name="hires")
