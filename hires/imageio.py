"""The old name of `hires.images`; kept for one release."""

from __future__ import annotations

from hires.images.formats import check_fits, check_output, read_text
from hires.images.sinks import ArraySink, ImageSink
from hires.images.sources import ImageSource
from hires.images.whole import check_png, fitted, on_canvas, read_picture, save_png, to_uint8

__all__ = [
    "ArraySink",
    "ImageSink",
    "ImageSource",
    "check_fits",
    "check_output",
    "check_png",
    "fitted",
    "on_canvas",
    "read_picture",
    "read_text",
    "save_png",
    "to_uint8",
]
