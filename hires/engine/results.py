"""What a render or an upscale returns."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.errors import RequestError
from hires.events import StageStats
from hires.planning.plan import MemoryPlan
from hires.tiling.geometry import Box, Size, bands
from hires.units import Json

if TYPE_CHECKING:
    from PIL.Image import Image

    from hires.images.boxes import Pixels
    from hires.images.sources import ImageSource

THUMBNAIL_PX = 512
"""The longest side of the picture that a notebook shows."""
ROWS_BYTES = 2**24
"""Of the rows that are copied at once from a picture to a file."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class HeldPicture:
    """A finished picture, in a file or in memory; a notebook shows it small."""

    path: Path | None
    """Where the picture is; None for one in memory."""
    size: Size
    """Its size in pixels."""
    drawn: Pixels | None = field(default=None, compare=False)
    """The pixels, where there is no file."""
    icc: bytes | None = field(default=None, compare=False)
    """Their colour profile, where there is no file; None for sRGB."""
    text: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What a file would say of them, where there is none."""

    @property
    def pixels(self) -> Any:
        """(height, width, bands) as they are coded: uint8, uint16 or float32. If there is a file, read from it each time.

        The last band of two or four is transparency. RequestError where the file is gone.
        """
        if self.drawn is not None:
            return self.drawn
        with self._source() as source:
            return source.read(Box(0, 0, source.size.height, source.size.width))

    @property
    def image(self) -> Image:
        """The picture as a PIL image of 8 bits: RGB, RGBA, L or LA. RequestError where the file is gone."""
        from hires.images.thumbnails import to_pillow

        return to_pillow(self.pixels)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the picture to a file of a format that hires writes, with its bits, its transparency, its profile and its text.

        Returns the path. OutputError for a file that is there, and for a format that cannot hold the picture.
        """
        from hires._version import __version__
        from hires.images.formats import check_fits, check_output, read_text
        from hires.images.sinks import ImageSink

        target = check_output(Path(path).expanduser(), overwrite)
        with self._source() as source:
            check_fits(target, self.size, source.bands, source.dtype)
            text = dict(self.text if self.path is None else read_text(self.path)) | {"Software": f"hires {__version__}"}
            rows, kind = max(1, ROWS_BYTES // (self.size.width * source.bands * source.dtype.itemsize)), source.dtype
            with ImageSink.open(target, self.size, source.bands, kind, source.icc, text, overwrite=overwrite) as sink:
                for top, bottom in bands(self.size.height, rows):
                    sink.write(source.read(Box(top, 0, bottom - top, self.size.width)))
        return target

    def _source(self) -> ImageSource:
        """The picture, to be read box by box."""
        from hires.images.sources import ArrayPicture, ImageSource

        if self.path is not None:
            return ImageSource.open(self.path)
        if self.drawn is None:
            raise RequestError("picture: its pixels are not kept here; take those of the result that this one belongs to")
        return ArrayPicture(self.drawn, self.icc)

    @property
    def _where(self) -> str:
        return str(self.path) if self.path is not None else "in memory" if self.drawn is not None else "pixels not kept"

    def _repr_png_(self) -> bytes | None:
        """A thumbnail of at most `THUMBNAIL_PX`, read in bands; None where the picture is gone."""
        from hires.images.thumbnails import thumbnail

        try:
            with self._source() as source:
                small = thumbnail(source, THUMBNAIL_PX)
        except RequestError:
            return None
        stream = io.BytesIO()
        small.save(stream, "PNG")
        return stream.getvalue()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What notebooks show: the thumbnail, and the result in one line where no picture can be shown."""
        png = self._repr_png_()
        if png is None:
            return {"text/plain": f"{self!r}: there is no picture to show"}
        return {"image/png": base64.b64encode(png).decode("ascii"), "text/plain": repr(self)}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class UpscaleResult(HeldPicture):
    """An enlarged picture: `path`, `size`, `pixels`, `image`, `save`."""

    source: Size
    """The size of the picture that was given."""
    upscaler: str
    """The network that enlarged it, or lanczos."""
    notes: tuple[str, ...]
    """How it was enlarged, and what could not be kept."""
    tiles: int
    """Tiles that a network ran in."""
    retries: int
    """Tiles that were repeated after an out-of-memory."""
    seconds: float
    peak_rss_bytes: int
    refined: RenderResult | None = None
    """The render that drew over it, with `refine`."""

    def __repr__(self) -> str:
        how = f"{self.upscaler}, refined" if self.refined is not None else self.upscaler
        return f"<hires.UpscaleResult {self.size} from {self.source} by {how}, {self.seconds:.1f} s, {self._where}>"

    def to_json(self) -> Json:
        """The result as plain JSON values."""
        return {
            "path": None if self.path is None else str(self.path),
            "source": str(self.source),
            "size": str(self.size),
            "upscaler": self.upscaler,
            "notes": list(self.notes),
            "tiles": self.tiles,
            "retries": self.retries,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "refined": None if self.refined is None else self.refined.to_json(),
        }


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RenderResult(HeldPicture):
    """A finished render: `path`, `size`, `pixels`, `image`, `save`."""

    seed: int
    plan: MemoryPlan
    """What was planned."""
    stats: tuple[StageStats, ...]
    """What each stage took, decoding included."""
    seconds: float
    """Of the whole call."""
    peak_rss_bytes: int
    """The process's peak resident memory."""

    def __repr__(self) -> str:
        return f"<hires.RenderResult {self.size}, seed {self.seed}, {self.seconds:.1f} s, {self._where}>"

    def predictions(self) -> list[Json]:
        """Predicted and measured peak bytes and seconds of each stage; on a CPU the measured bytes are the whole process's."""
        costs = {cost.stage: cost for cost in self.plan.costs}
        rows = []
        for stage in self.stats:
            cost = costs.get(stage.stage.removesuffix(" (tiny)"))
            if cost is not None:
                rows.append(
                    {
                        "stage": stage.stage,
                        "predicted_peak_bytes": cost.peak_bytes,
                        "measured_peak_bytes": stage.peak_bytes,
                        "predicted_seconds": round(cost.seconds, 3),
                        "measured_seconds": stage.seconds,
                    }
                )
        return rows

    def to_json(self) -> Json:
        """The result as plain JSON values: path, size, seed, plan, predictions beside measurements, stats."""
        return {
            "path": None if self.path is None else str(self.path),
            "size": str(self.size),
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "plan": self.plan.to_json(),
            "predictions": self.predictions(),
            "stats": [dataclasses.asdict(stage) for stage in self.stats],
        }
