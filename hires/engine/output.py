"""Takes a render's rows into a file or an array, and writes the file's text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hires._version import __version__
from hires.engine.results import RenderResult
from hires.errors import OutputError, RequestError
from hires.events import Event, OnEvent
from hires.images.infotext import written
from hires.options.lora import tag_of
from hires.options.render import RenderRequest
from hires.planning.plan import MemoryPlan
from hires.sampling.registry import SAMPLER_FACTS, SCHEDULE_FACTS
from hires.tiling.geometry import Size

if TYPE_CHECKING:
    from hires.images.sinks import ImageSink


def delivery(output: str | Path | None, overwrite: bool, size: Size, bits: int | None) -> Delivery:
    """Where a picture goes. OutputError, before any work, if it cannot be written there."""
    if bits not in (None, *DEPTHS):
        raise RequestError(f"bits {bits}: give 8 or 16")
    if output is None:
        return Delivery(None, bits=bits or 8)
    from hires.images.formats import check_fits, check_output

    path = check_output(path_of(output), overwrite)
    check_fits(path, size, dtype=f"uint{bits or 8}")
    return Delivery(path, overwrite, bits or 8)


def path_of(output: str | Path) -> Path:
    """An output's path, with a leading ~ expanded. OutputError where that is nobody's."""
    try:
        return Path(output).expanduser()
    except RuntimeError as error:
        raise OutputError(f"output {output}: {error}; give a full path") from None


def is_marked(path: Path, mark: str, size: Size) -> bool:
    """Whether a file is the finished picture of the request that a mark is of, and still of its size."""
    from hires.images.formats import read_text
    from hires.images.sources import ImageSource

    try:
        if read_text(path).get(MARK) != mark:
            return False
        with ImageSource.open(path) as source:
            return source.size == size
    except RequestError:
        return False


OpenSink = Callable[["Size"], "ImageSink"]
DEPTHS = (8, 16)
MARK = "hires:request"
"""The key of a file's text under which its mark is written."""


@dataclass(frozen=True)
class Delivery:
    """Where one render goes."""

    path: Path | None
    """The file; None for an array."""
    overwrite: bool = False
    """Whether a file that is there is replaced."""
    bits: int = 8
    """Of each value, 8 or 16."""
    mark: str = ""
    """What the file is known by as the picture of its request (`resume.fingerprint.mark_of`); empty for nothing."""

    @contextmanager
    def open(self, head: Mapping[str, str] | None = None, within: Path | None = None) -> Iterator[OpenDelivery]:
        """What takes the rows of a render; on failure nothing of them stays.

        head: text that goes before the pixels, where other tools look for it. within: a folder for the unfinished file.
        """
        opened = OpenDelivery(self, dict(head or {}), within)
        try:
            yield opened
        except BaseException:
            opened.abort()
            raise


class OpenDelivery:
    """Takes the rows of one render; called with a size it opens a sink, anew when a way to decode was given up."""

    def __init__(self, delivery: Delivery, head: dict[str, str], within: Path | None) -> None:
        self._delivery, self._head, self._within = delivery, head, within
        self._sink: ImageSink | None = None

    def __call__(self, size: Size) -> ImageSink:
        """An empty sink; what the one before holds is thrown away."""
        from hires.images.atomic_file import Unfinished
        from hires.images.formats import check_output
        from hires.images.sinks import ArraySink, ImageSink

        self.abort()
        path, dtype = self._delivery.path, f"uint{self._delivery.bits}"
        if path is None:
            self._sink = ArraySink(size, dtype=dtype)
        else:
            within = self._within if self._within is not None and self._within.is_dir() else None
            unfinished = Unfinished(check_output(path, self._delivery.overwrite), self._delivery.overwrite, within)
            self._sink = ImageSink.open(unfinished, size, dtype=dtype, metadata=self._head)
        return self._sink

    def finish(self, result: RenderResult, request: RenderRequest, on_event: OnEvent) -> RenderResult:
        """Close the file, which only now is there under its name; the result with its path, or with its pixels."""
        from hires.images.sinks import ArraySink

        assert self._sink is not None, "a picture was decoded"
        text = metadata(request, result.plan) | {"hires:predictions": json.dumps(result.predictions())}
        text |= {MARK: self._delivery.mark} if self._delivery.mark else {}
        if isinstance(self._sink, ArraySink):
            return replace(result, drawn=self._sink.pixels, text=self._head | text)
        on_event(Event(stage="write", done=0, total=1))
        self._sink.close(text)
        on_event(Event(stage="write", done=1, total=1))
        return replace(result, path=self._delivery.path)

    def abort(self) -> None:
        """Remove what was written."""
        if self._sink is not None:
            self._sink.abort()


def parameters(request: RenderRequest, plan: MemoryPlan) -> dict[str, str]:
    """The text by which A1111 and the tools around it tell how a picture was made."""
    first = plan.stages[0]
    values = {
        "Steps": first.taken_steps,
        "Sampler": SAMPLER_FACTS[first.sampler].label,
        "CFG scale": f"{first.guidance:g}",
        "Seed": request.seed,
        "Size": plan.output,
        "Model": plan.model,
        "Schedule type": SCHEDULE_FACTS[first.schedule].label,
    } | ({} if request.strength is None else {"Denoising strength": f"{request.strength:g}"})
    values |= {} if request.clip_skip is None else {"Clip skip": request.clip_skip}
    values |= {} if request.prompt_syntax is None else {"Prompt syntax": request.prompt_syntax}
    values |= {name: text for name, text in (("Prompt L", request.prompt_l), ("Negative prompt L", request.negative_l)) if text}
    prompt = " ".join([request.prompt, *(tag_of(lora) for lora in request.loras)])
    return {"parameters": written(prompt, request.negative, values | {"Version": f"hires {__version__}"})}


def metadata(request: RenderRequest, plan: MemoryPlan) -> dict[str, str]:
    """All text of a file: prompt, seed, sampler, schedule and the whole plan."""
    return {
        "Software": f"hires {__version__}",
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": str(request.seed),
        "sampler": plan.stages[0].sampler,
        "schedule": plan.stages[0].schedule,
        "model": plan.model,
        "hires:plan": json.dumps(plan.to_json(), default=str, sort_keys=True),
    }
