"""Where a render's rows go: a file that is written while they are decoded, or an array; and the text that goes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires._version import __version__
from hires.engine.results import RenderResult
from hires.errors import OutputError, RequestError
from hires.events import Event, OnEvent
from hires.images.infotext import written
from hires.options.render import RenderRequest
from hires.planning.plan import MemoryPlan
from hires.sampling.registry import SAMPLERS, SCHEDULES
from hires.tiling.geometry import Size

if TYPE_CHECKING:
    from hires.images.sinks import ImageSink


def delivery(output: str | Path | None, overwrite: bool, size: Size, bits: int | None) -> Delivery:
    """Where a picture goes. OutputError where it cannot be written there, before any work."""
    if bits not in (None, *DEPTHS):
        raise RequestError(f"bits {bits}: give 8 or 16")
    if output is None:
        return Delivery(None, bits=bits or 8)
    from hires.images.formats import check_fits, check_output

    path = check_output(_path(output), overwrite)
    check_fits(path, size, dtype=f"uint{bits or 8}")
    return Delivery(path, overwrite, bits or 8)


def _path(output: str | Path) -> Path:
    try:
        return Path(output).expanduser()
    except RuntimeError as error:
        raise OutputError(f"output {output}: {error}; give a full path") from None


OpenSink = Callable[["Size"], "ImageSink"]
DEPTHS = (8, 16)


@dataclass
class Delivery:
    """The output of one render; called with a size it opens a sink, again after a way to decode that was given up.

    path: None for an array. bits: of each value. within: a folder for the unfinished file, where it is there. head: text that
    goes before the pixels, where other tools look for it; all else is known when they are there.
    """

    path: Path | None
    overwrite: bool = False
    bits: int = 8
    within: Path | None = None
    head: dict[str, str] = field(default_factory=dict)
    _sink: ImageSink | None = field(default=None, init=False)

    def __call__(self, size: Size) -> ImageSink:
        from hires.images.sinks import ArraySink, ImageSink

        self.abort()
        kind = f"uint{self.bits}"
        if self.path is None:
            self._sink = ArraySink(size, dtype=kind)
        else:
            within = self.within if self.within is not None and self.within.is_dir() else None
            self._sink = ImageSink.open(
                self.path, size, dtype=kind, metadata=self.head, overwrite=self.overwrite, within=within
            )
        return self._sink

    def finish(self, result: RenderResult, request: RenderRequest, tell: OnEvent) -> RenderResult:
        """The result with its file, which now is there, or with its pixels."""
        from hires.images.sinks import ArraySink

        assert self._sink is not None, "a picture was decoded"
        if isinstance(self._sink, ArraySink):
            return replace(result, drawn=self._sink.pixels)
        assert self.path is not None
        path = self.path
        tell(Event(stage="write", done=0, total=1))
        self._sink.close(metadata(request, result.plan) | {"hires:predictions": json.dumps(result.predictions())})
        tell(Event(stage="write", done=1, total=1))
        return replace(result, path=path, drawn=lambda: _read(path))

    def abort(self) -> None:
        if self._sink is not None:
            self._sink.abort()


def _read(path: Path) -> Any:
    from hires.images.sources import ImageSource
    from hires.tiling.geometry import Box

    with ImageSource.open(path) as source:
        return source.read(Box(0, 0, source.size.height, source.size.width))


def parameters(request: RenderRequest, made: MemoryPlan) -> dict[str, str]:
    """The text by which A1111 and the tools around it tell how a picture was made."""
    first = made.stages[0]
    values = {
        "Steps": first.taken_steps,
        "Sampler": SAMPLERS[first.sampler].label,
        "CFG scale": f"{first.guidance:g}",
        "Seed": request.seed,
        "Size": made.output,
        "Model": made.model,
        "Schedule type": SCHEDULES[first.schedule].label,
    } | ({} if request.strength is None else {"Denoising strength": f"{request.strength:g}"})
    return {"parameters": written(request.prompt, request.negative, values | {"Version": f"hires {__version__}"})}


def metadata(request: RenderRequest, made: MemoryPlan) -> dict[str, str]:
    """The text in a file: prompt, seed, sampler, schedule and the whole plan."""
    return {
        "Software": f"hires {__version__}",
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": str(request.seed),
        "sampler": made.stages[0].sampler,
        "schedule": made.stages[0].schedule,
        "model": made.model,
        "hires:plan": json.dumps(made.to_json(), default=str, sort_keys=True),
    }
