"""Plans and runs one task of a job; the file goes into the job's folder."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hires._version import __version__
from hires.devices.describe import budget_of, describe_device
from hires.devices.probe import choose_device
from hires.engine.engine import edit_on, render_on
from hires.engine.loaded import LoadedModels
from hires.engine.requests import DEFAULT_SCALE, editing, scaled, spec_for, text_to_image, with_captions
from hires.engine.results import UpscaleResult
from hires.errors import RequestError, SizeError
from hires.events import OnEvent
from hires.images.decoders import PILLOW_FORMATS
from hires.images.formats import check_fits
from hires.images.sinks import ImageSink
from hires.images.sources import ImageSource
from hires.options.fields import chosen
from hires.options.render import EditOptions, RenderOptions, RenderRequest
from hires.options.sizes import parse_size
from hires.options.upscale import REFINE_STRENGTH, REFINEMENT, Refinement, UpscaleRequest
from hires.pipelines.clock import as_part
from hires.planning import planner
from hires.planning.plan import MemoryPlan
from hires.server.bodies import (
    AnyTask,
    EditTask,
    RenderTask,
    UpscaleTask,
    budget,
    check_limit,
    request_of,
    resolve_names,
    size_of,
)
from hires.server.settings import Library, Settings
from hires.tiling.geometry import Size

ENLARGE_SHARE = 0.1
"""The share of the whole time that enlarging takes where the result is then drawn over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedPicture:
    """A finished picture and how it was made."""

    file: str
    """Its name in the job's folder."""
    size: Size
    seed: int
    seconds: float
    sampler: str = ""
    """Empty, as `schedule`, where no diffusion model ran."""
    schedule: str = ""
    steps: int = 0
    guidance: float = 0.0
    notes: tuple[str, ...] = ()


class Worker:
    """Plans and runs tasks on one device, where models stay between them.

    Errors are those of `hires.render`, `edit` and `upscale`.
    """

    def __init__(self, settings: Settings, library: Library, device: str) -> None:
        self.settings, self.library = settings, library
        self.device = str(choose_device(device))  # plans are for this machine, whatever its budget
        self.device_name = describe_device(self.device, None).name
        self.models = LoadedModels()
        self._at_work = threading.Lock()

    def plan(self, task: AnyTask, folder: Path) -> MemoryPlan | None:
        """What a task would do; None for an enlargement without a diffusion model. RequestError for what cannot be done."""
        vram = budget(task, self.settings.vram)
        if isinstance(task, UpscaleTask):
            request = self._refinement(task, folder)
            if request is None:
                return None
            spec = text_to_image(spec_for(request), task.prompt)
        else:
            size = size_of(task, self.settings.limits, self._picture_size(task, folder))
            check_fits(Path(f"result.{task.format}"), size, dtype=f"uint{task.bits or 8}")
            request = request_of(task, size, self.library)
            if isinstance(task, RenderTask):
                _check_start(task)
            spec = editing(spec_for(request)) if isinstance(task, EditTask) else text_to_image(spec_for(request), task.prompt)
        device = describe_device(self.device, budget_of(vram), budget_of(self.settings.ram), self.models.device_bytes)
        return planner.plan(with_captions(request), spec, device)

    def weights(self, task: AnyTask, plan: MemoryPlan | None) -> dict[str, float]:
        """The share of its time that each stage of a task is expected to take."""
        costs = {} if plan is None else {cost.stage: max(cost.seconds, 1e-3) for cost in plan.costs}
        if isinstance(task, UpscaleTask):
            share = sum(costs.values()) * ENLARGE_SHARE / (1 - ENLARGE_SHARE) if costs else 1.0
            return {"enlarge": share, **costs}
        return costs

    def run(self, task: AnyTask, folder: Path, name: str, on_event: OnEvent) -> FinishedPicture:
        """Run a task; the file is `name` and the format's suffix. `on_event` may raise Cancelled."""
        output = folder / f"{name}.{task.format}"
        with self._at_work:
            if isinstance(task, UpscaleTask):
                return self._upscale(task, folder, output, on_event)
            return self._render(task, folder, output, on_event)

    def unload(self) -> None:
        """Let the models go, after the task in progress; the next task loads what it needs."""
        with self._at_work:
            self.models.unload()

    def _render(self, task: RenderTask | EditTask, folder: Path, output: Path, on_event: OnEvent) -> FinishedPicture:
        own: dict[str, object] = resolve_names(task, self.library) | {
            "tiny_vae": self.settings.tiny_vae,
            "device": self.device,
            "vram": budget(task, self.settings.vram),
            "ram": self.settings.ram,
            "output": output,
            "overwrite": True,
            "on_event": on_event,
            "size": str(size_of(task, self.settings.limits, self._picture_size(task, folder))),
        }
        options = task.options(*own) | own
        if isinstance(task, EditTask):
            wanted = chosen(EditOptions, "edit", options)
            result = edit_on(self.models, folder / task.picture, task.prompt, wanted)
        else:
            pictures = {field: _within(folder, getattr(task, field)) for field in task.pictures}
            result = render_on(self.models, task.prompt, chosen(RenderOptions, "render", options | pictures))
        stage = result.plan.stages[0]
        return FinishedPicture(
            file=output.name,
            size=result.size,
            seed=result.seed,
            seconds=result.seconds,
            sampler=stage.sampler,
            schedule=stage.schedule,
            steps=stage.taken_steps,
            guidance=stage.guidance,
            notes=result.plan.notes,
        )

    def _upscale(self, task: UpscaleTask, folder: Path, output: Path, on_event: OnEvent) -> FinishedPicture:
        size, source = self._target(task, folder), folder / task.picture
        if task.mixed is not None and task.mixed[1]:
            return self._mix(task, source, size, output, on_event)
        result = self._enlarge(task, source, size, self.library.upscaler(task.upscaler), output, on_event)
        return FinishedPicture(file=output.name, size=size, seed=task.seed or 0, seconds=result.seconds, notes=result.notes)

    def _mix(self, task: UpscaleTask, source: Path, size: Size, output: Path, on_event: OnEvent) -> FinishedPicture:
        """Add the pictures of two upscalers, 8 bit, in memory, in the shares that the task gives."""
        assert task.mixed is not None
        begun = time.monotonic()
        names = (self.library.upscaler(task.upscaler), self.library.upscaler(task.mixed[0]))
        halves = (as_part(on_event, 0.0, 0.5, begun), as_part(on_event, 0.5, 1.0, begun))
        first, second = (
            self._enlarge(task, source, size, name, None, half).pixels for name, half in zip(names, halves, strict=True)
        )
        mixed = Image.blend(_pillow(first), _pillow(second), task.mixed[1])
        pixels = np.asarray(mixed).reshape(size.height, size.width, -1)
        metadata = {"Software": f"hires {__version__}"}
        with ImageSink.open(output, size, pixels.shape[2], metadata=metadata, overwrite=True) as sink:
            sink.write(pixels)
        return FinishedPicture(file=output.name, size=size, seed=task.seed or 0, seconds=time.monotonic() - begun)

    def _enlarge(
        self, task: UpscaleTask, source: Path, size: Size, upscaler: str, output: Path | None, on_event: OnEvent
    ) -> UpscaleResult:
        from hires.engine.upscale import Upscaler

        own = resolve_names(task, self.library) | {"strength": task.strength or REFINE_STRENGTH, "tile_px": task.tile_px}
        shared = {name: value for name, value in task.options(*own).items() if name in REFINEMENT}
        picture: Path | Image.Image = source
        if upscaler == "nearest":
            picture = picture if task.refine else _nearest(source, size)
            upscaler = "lanczos"
        options = UpscaleRequest(
            size=size,
            upscaler=upscaler,
            refinement=Refinement(**shared | own) if task.refine else None,
            bits=task.bits,
            device=self.device,
            dtype=task.dtype,
            vram=budget(task, self.settings.vram),
            ram=self.settings.ram,
        )
        return Upscaler(options, self.models).run(picture, output, overwrite=True, on_event=on_event)

    def _refinement(self, task: UpscaleTask, folder: Path) -> RenderRequest | None:
        """The render that draws over the enlarged picture; None where the task does not refine."""
        size = self._target(task, folder)
        check_fits(Path(f"result.{task.format}"), size, dtype=f"uint{task.bits or 8}")
        self.library.upscaler(task.upscaler)
        if task.mixed is not None:
            self.library.upscaler(task.mixed[0])
        if not task.refine:
            if task.strength is not None:
                raise RequestError(f"strength {task.strength:g}: how much a refinement draws anew; set refine")
            return None
        refinement = RenderTask(
            prompt=task.prompt,
            negative=task.negative,
            model=task.model,
            seed=task.seed,
            steps=task.steps,
            guidance=task.guidance,
            preset=task.preset,
            loras=task.loras,
            init=task.picture,
            family=task.family,
            strength=task.strength or REFINE_STRENGTH,
            tile_px=task.tile_px,
            colour_fix=task.colour_fix,
        )
        return request_of(refinement, size, self.library)

    def _target(self, task: UpscaleTask, folder: Path) -> Size:
        """The size to enlarge to. SizeError where it is over the limit or given twice."""
        if task.size is not None:
            if task.scale is not None:
                raise SizeError(f"scale {task.scale:g} and size {task.size}: give one of the two")
            return check_limit(parse_size(task.size), self.settings.limits)
        with ImageSource.open(folder / task.picture) as source:
            size = scaled(source.size, task.scale or DEFAULT_SCALE)
        return check_limit(size, self.settings.limits)

    def _picture_size(self, task: RenderTask | EditTask, folder: Path) -> tuple[int, int] | None:
        name = task.picture if isinstance(task, EditTask) else task.init
        if name is None:
            return None
        with Image.open(folder / name, formats=PILLOW_FORMATS) as opened:
            return opened.size


def _check_start(task: RenderTask) -> None:
    """RequestError where a mask or a strength has no picture to apply to."""
    if task.init is not None:
        return
    if task.mask is not None:
        raise RequestError("mask: says where a picture is drawn anew; send the picture as init")
    if task.strength is not None:
        raise RequestError(f"strength {task.strength:g}: how much of a picture to draw anew; send the picture as init")


def _within(folder: Path, name: str | None) -> Path | None:
    return None if name is None else folder / name


def _nearest(source: Path, size: Size) -> Image.Image:
    with Image.open(source, formats=PILLOW_FORMATS) as opened:
        plain = opened if opened.mode in ("L", "LA", "RGB", "RGBA") else opened.convert("RGB")
        return plain.resize((size.width, size.height), Image.Resampling.NEAREST)


def _pillow(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
