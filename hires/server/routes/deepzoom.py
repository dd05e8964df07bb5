"""Tiles of a finished picture for a viewer, cut from a pyramid of pages on disk.

The whole picture is never in memory. A TIFF that hires writes is such a pyramid itself. Other files get one beside them when
they are first looked at, which reads them once from top to bottom.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from hires.errors import RunError
from hires.images.decoders import open_vips
from hires.tiling.geometry import Size

if TYPE_CHECKING:
    import pyvips

TILE_PX = 512
QUALITY = 95
VIEW = ".view.tif"
_building = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pyramid:
    """A picture at full size (level `deepest`) and halved again and again."""

    path: Path
    sizes: tuple[Size, ...]
    """The sizes of the file's pages, the full one first."""

    @property
    def deepest(self) -> int:
        """The level at full size."""
        return len(self.sizes) - 1

    def to_json(self) -> dict[str, int]:
        """What the viewer needs to know."""
        full = self.sizes[0]
        return {"width": full.width, "height": full.height, "tile": TILE_PX, "max_level": self.deepest}

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """A tile as a JPEG; None outside the picture. Level 0 is the smallest page."""
        if not 0 <= level <= self.deepest:
            return None
        page = self.deepest - level
        stored, full = self.sizes[page], self.sizes[0]
        shown = Size(-(-full.height // 2**page), -(-full.width // 2**page))  # as viewers count; the file rounds down
        left, top = column * TILE_PX, row * TILE_PX
        if min(column, row) < 0 or left >= shown.width or top >= shown.height:
            return None
        image = open_vips(self.path, page=page)
        width, height = min(TILE_PX, shown.width - left), min(TILE_PX, shown.height - top)
        inner = image.crop(
            min(left, stored.width - 1),
            min(top, stored.height - 1),
            min(width, max(1, stored.width - left)),
            min(height, max(1, stored.height - top)),
        )
        if (inner.width, inner.height) != (width, height):
            inner = inner.embed(0, 0, width, height, extend="copy")
        content: bytes = _eight_bits(inner).jpegsave_buffer(Q=QUALITY, keep="none", subsample_mode="off")
        return content


def pyramid_of(path: Path) -> Pyramid:
    """The pyramid of a picture file, built beside it where there is none. RunError where the file cannot be read."""
    return _pyramid(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _pyramid(path: Path, changed: int) -> Pyramid:
    import pyvips

    view = path.with_name(path.name + VIEW)
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            sizes = _pages(path)
            if sizes is not None:
                return Pyramid(path=path, sizes=sizes)
        with _building:
            if not view.is_file():
                _build(path, view)
        sizes = _pages(view)
    except pyvips.Error as error:
        raise RunError(f"{path.name}: cannot be shown ({' '.join(str(error).split())[:200]})") from None
    assert sizes is not None, "just built"
    return Pyramid(path=view, sizes=sizes)


def _build(path: Path, view: Path) -> None:
    image = _eight_bits(open_vips(path, access="sequential"))
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


def _eight_bits(image: pyvips.Image) -> pyvips.Image:
    """The image with 8 bits, in colour or grey, transparency laid on white."""
    if image.format == "ushort":
        image = (image >> 8).cast("uchar").copy(interpretation="srgb" if image.bands > 2 else "b-w")
    if image.hasalpha():
        image = image.flatten(background=255)
    return image


def _pages(path: Path) -> tuple[Size, ...] | None:
    """The sizes of a pyramid's pages, each half of the one before; None where the file is no pyramid."""
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
