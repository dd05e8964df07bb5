"""Picture files as clients send them."""

from __future__ import annotations

import base64
import io

from PIL import Image


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    """A plain picture; mode "1" takes few bytes for many pixels."""
    into = io.BytesIO()
    Image.new(mode, (width, height), 1).save(into, format="PNG")
    return into.getvalue()


def png_base64(width: int, height: int, mode: str = "RGB") -> str:
    return base64.b64encode(png(width, height, mode)).decode()
