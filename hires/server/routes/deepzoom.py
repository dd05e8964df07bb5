"""Tiles of a finished picture for a viewer, cut from a pyramid on disk; the whole picture is never in memory.

A TIFF of ours is such a pyramid itself. Other files get one beside them when they are first looked at, which reads them once
from top to bottom.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hires.errors import RunError
from hires.images.decoders import open_vips
from hires.tiling.geometry import Size

TILE_PX = 512
QUALITY = 95
VIEW = ".view.tif"
_building = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pyramid:
    """A picture at full size (level `deepest`) and halved again and again; sizes: of the file's pages, the full one first."""

    path: Path
    sizes: tuple[Size, ...]

    @property
    def deepest(self) -> int:
        return len(self.sizes) - 1

    def to_json(self) -> dict[str, Any]:
        full = self.sizes[0]
        return {"width": full.width, "height": full.height, "tile": TILE_PX, "max_level": self.deepest}

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """A tile as a JPEG; None outside the picture. Level 0 is the smallest page."""
        if not 0 <= level <= self.deepest:
            return None
        page = self.deepest - level
        held, full = self.sizes[page], self.sizes[0]
        wanted = Size(-(-full.height // 2**page), -(-full.width // 2**page))  # as viewers count; the file rounds down
        left, top = column * TILE_PX, row * TILE_PX
        if min(column, row) < 0 or left >= wanted.width or top >= wanted.height:
            return None
        image = open_vips(self.path, page=page)
        width, height = min(TILE_PX, wanted.width - left), min(TILE_PX, wanted.height - top)
        inner = image.crop(
            min(left, held.width - 1),
            min(top, held.height - 1),
            min(width, max(1, held.width - left)),
            min(height, max(1, held.height - top)),
        )
        if (inner.width, inner.height) != (width, height):
            inner = inner.embed(0, 0, width, height, extend="copy")
        found: bytes = _eight(inner).jpegsave_buffer(Q=QUALITY, keep="none", subsample_mode="off")
        return found


def pyramid_of(path: Path) -> Pyramid:
    """The pyramid of a picture file, built beside it where there is none. RunError where the file cannot be read."""
    return _pyramid(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _pyramid(path: Path, changed: int) -> Pyramid:
    import pyvips

    view = path.with_name(path.name + VIEW)
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            found = _pages(path)
            if found is not None:
                return Pyramid(path=path, sizes=found)
        with _building:
            if not view.is_file():
                _build(path, view)
        sizes = _pages(view)
    except pyvips.Error as error:
        raise RunError(f"{path.name}: cannot be shown ({' '.join(str(error).split())[:200]})") from None
    assert sizes is not None, "just built"
    return Pyramid(path=view, sizes=sizes)


def _build(path: Path, view: Path) -> None:
    image = _eight(open_vips(path, access="sequential"))
    part = view.with_name(f".{view.name}.part")
    try:
        image.tiffsave(
            str(part),
            tile=True,
            pyramid=True,
            tile_width=TILE_PX,
            tile_height=TILE_PX,
            compression="jpeg",
            Q=QUALITY,
            bigtiff=True,
            depth="onetile",
            keep="none",
        )
        part.replace(view)
    finally:
        part.unlink(missing_ok=True)


def _eight(image: Any) -> Any:
    """8 bits, in colour or grey, transparency laid on white."""
    if image.format == "ushort":
        image = (image >> 8).cast("uchar").copy(interpretation="srgb" if image.bands > 2 else "b-w")
    if image.hasalpha():
        image = image.flatten(background=255)
    return image


def _pages(path: Path) -> tuple[Size, ...] | None:
    """The sizes of a pyramid's pages, each half of the one before; None where the file is none."""
    first = open_vips(path)
    count = first.get("n-pages") if first.get_typeof("n-pages") else 1
    sizes = [Size(first.height, first.width)]
    for page in range(1, count):
        image = open_vips(path, page=page)
        last = sizes[-1]
        if abs(image.width * 2 - last.width) > 1 or abs(image.height * 2 - last.height) > 1:
            return None
        sizes.append(Size(image.height, image.width))
    return tuple(sizes) if count > 1 or max(sizes[0].height, sizes[0].width) <= TILE_PX else None
