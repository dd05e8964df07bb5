"""What a render or an upscale returns."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.events import StageStats
from hires.planning.plan import MemoryPlan
from hires.tiling.geometry import Size
from hires.units import Json

if TYPE_CHECKING:
    from PIL.Image import Image

    from hires.images.boxes import Pixels

THUMBNAIL_PX = 512
"""The longest side of the picture that a notebook shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscaleResult:
    """An enlarged picture."""

    path: Path | None
    """Where it is; None for an array."""
    source: Size
    """The size of the picture that was given."""
    size: Size
    """Its own size."""
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
    pixels: Any = field(default=None, repr=False)
    """(height, width, bands), if there is no file."""

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
class RenderResult:
    """A finished render."""

    path: Path | None
    """Where the picture is; None for an array."""
    size: Size
    seed: int
    plan: MemoryPlan
    """What was planned."""
    stats: tuple[StageStats, ...]
    """What each stage took, decoding included."""
    seconds: float
    """Of the whole call."""
    peak_rss_bytes: int
    """The process's peak resident memory."""
    drawn: Pixels | Callable[[], Pixels] | None = field(default=None, repr=False)
    """The pixels, or a function that reads them from the file."""

    @property
    def pixels(self) -> Any:
        """(height, width, 3) uint8 or uint16; if there is a file, read from it each time."""
        return self.drawn() if callable(self.drawn) else self.drawn

    @property
    def image(self) -> Image:
        """The picture as a PIL image of 8 bits."""
        from PIL import Image

        pixels = self.pixels
        return Image.fromarray(pixels if pixels.dtype == "uint8" else (pixels // 257).astype("uint8"))

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the picture to a file of a format that hires writes, its text with it. OutputError for a file that is there."""
        from hires._version import __version__
        from hires.images.formats import check_fits, check_output
        from hires.images.sinks import ImageSink

        pixels = self.pixels
        target = check_output(Path(path).expanduser(), overwrite)
        check_fits(target, self.size, dtype=pixels.dtype.name)
        text = {
            "Software": f"hires {__version__}",
            "seed": str(self.seed),
            "model": self.plan.model,
            "hires:plan": json.dumps(self.plan.to_json(), default=str, sort_keys=True),
        }
        with ImageSink.open(target, self.size, dtype=pixels.dtype.name, metadata=text, overwrite=overwrite) as sink:
            sink.write(pixels)
            sink.close()
        return target

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else str(self.path)
        return f"<hires.RenderResult {self.size}, seed {self.seed}, {self.seconds:.1f} s, {where}>"

    def _repr_png_(self) -> bytes:
        """A thumbnail of at most `THUMBNAIL_PX`, as notebooks show it."""
        image = self.image
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return stream.getvalue()

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
