"""The version number, in its own file so that any module may read it."""

__version__ = "0.1.0"
