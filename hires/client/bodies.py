"""The JSON bodies of requests, from the options that a caller gives."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.errors import RequestError
from hires.options.fields import declared
from hires.options.render import EditOptions, RenderOptions
from hires.options.sizes import as_size
from hires.options.upscale import UpscaleOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    PictureLike = str | Path | bytes | Image.Image | NDArray[np.uint8]

PICTURES = ("init", "mask", "control", "picture")
DECLARATIONS = {"render": RenderOptions, "edit": EditOptions, "upscale": UpscaleOptions}


def request_body(kind: str, fields: Mapping[str, object]) -> dict[str, object]:
    """The body of a job or a plan. RequestError for an option that belongs to the machine that renders.

    Options that are None are left out, except where their default is another value.
    """
    options = declared(DECLARATIONS[kind]) if kind in DECLARATIONS else {}
    body: dict[str, object] = {"kind": kind}
    for name, value in fields.items():
        field = options.get(name)
        if field is not None and field.option.local and value not in (None, field.default):
            raise RequestError(
                f"{name} {value!r}: belongs to the machine that renders; the server takes it from its own settings"
            )
        none_is_default = field is None or field.option.local or field.default is None
        if value is not None or not none_is_default:
            body[name] = _json_value(name, value)
    return body


def _json_value(name: str, value: Any) -> object:
    """The value of a field as JSON: pictures in base64, sizes as WIDTHxHEIGHT."""
    if name in PICTURES:
        return base64.b64encode(_picture_file(value)).decode("ascii")
    if name == "size" and not isinstance(value, str):
        return str(as_size(value))
    if name == "loras":
        return [str(lora) for lora in value]
    if name == "colour_fix" and value == "none":
        return None
    return value


def _picture_file(picture: PictureLike) -> bytes:
    """The file of a picture; pixels are written as PNG."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        try:
            return Path(picture).expanduser().read_bytes()
        except OSError as error:
            raise RequestError(f"picture {picture}: {error.strerror or error}; give a picture file") from None
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    content = io.BytesIO()
    image.save(content, format="PNG", compress_level=1)
    return content.getvalue()
