"""Plans and runs one task of a job; the file goes into the job's folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hires._version import __version__
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from hires.devices.describe import budget_of, describe_device
from hires.devices.probe import choose_device
from hires.devices.spec import DeviceSpec
from hires.engine.engine import edit_on, load_on, render_on
from hires.engine.loaded import FamilyKey, LoadedModels, family_key
from hires.engine.requests import DEFAULT_SCALE, editing, request_from, scaled, spec_for, text_to_image, with_captions
from hires.engine.results import UpscaleResult
from hires.engine.upscale import ENLARGE_SHARE, Upscaler, refinement_options
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
from hires.pipelines.base import Runtime
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

SECONDS_WITHOUT_A_MODEL = 1.0
"""What an enlargement without a diffusion model counts in the queue's order; no cost model covers it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a task is expected to take on a kind of device."""

    seconds: float
    model: FamilyKey | None = None
    """What its networks are known by, on whichever device of the kind; None where it needs none."""


class Worker:
    """Plans and runs tasks on one device, where models stay between them.

    Errors are those of `hires.render`, `edit` and `upscale`.
    """

    def __init__(self, settings: Settings, library: Library, device: str) -> None:
        self.settings, self.library = settings, library
        self.device = str(choose_device(device))  # plans are for this machine, whatever its budget
        self.models = LoadedModels(self.device)
        self.spec = self.describe(settings.vram)
        """The device as it was at the start."""
        self.used_last: FamilyKey | None = None
        """The model of the picture that ran last, as its estimate names it; whoever runs pictures notes it."""
        self._used_at = time.monotonic()

    def describe(self, vram: str | None) -> DeviceSpec:
        """The device as it is now, with a budget."""
        return describe_device(self.device, budget_of(vram), budget_of(self.settings.ram), self.models.device_bytes)

    @property
    def resident(self) -> frozenset[FamilyKey]:
        """The models in memory and the one used last, as estimates name them."""
        last = () if self.used_last is None else (self.used_last,)
        return frozenset((*map(_on_any_device, self.models.keys), *last))

    @property
    def idle_seconds(self) -> float:
        """For how long no task has run and no model was loaded or let go."""
        return time.monotonic() - self._used_at

    def plan(self, task: AnyTask, folder: Path) -> MemoryPlan | None:
        """What a task would do; None for an enlargement without a diffusion model. RequestError for what cannot be done."""
        drawing = self._drawing(task, folder)
        return None if drawing is None else self._plan(task, *drawing)

    def estimate(self, task: AnyTask, folder: Path) -> Estimate:
        """What a task is expected to take. RequestError for what cannot be done."""
        drawing = self._drawing(task, folder)
        if drawing is None:
            return Estimate(seconds=SECONDS_WITHOUT_A_MODEL)
        plan = self._plan(task, *drawing)
        runtime = Runtime.of(drawing[0], plan, torch.device(self.device))
        return Estimate(seconds=_seconds(task, plan), model=_on_any_device(family_key(*drawing, runtime)))

    def _drawing(self, task: AnyTask, folder: Path) -> tuple[RenderRequest, ModelSpec] | None:
        """What a task draws, and with which model; None for an enlargement without a diffusion model."""
        if isinstance(task, UpscaleTask):
            refinement = self._refinement(task, folder)
            return None if refinement is None else (refinement, text_to_image(spec_for(refinement), task.prompt))
        size = size_of(task, self.settings.limits, self._picture_size(task, folder))
        check_fits(Path(f"result.{task.format}"), size, dtype=f"uint{task.bits or 8}")
        request = request_of(task, size, self.library)
        if isinstance(task, EditTask):
            return request, editing(spec_for(request))
        _check_start(task)
        return request, text_to_image(spec_for(request), task.prompt)

    def _plan(self, task: AnyTask, request: RenderRequest, spec: ModelSpec) -> MemoryPlan:
        return planner.plan(with_captions(request), spec, self.describe(budget(task, self.settings.vram)))

    def run(self, task: AnyTask, folder: Path, name: str, on_event: OnEvent) -> FinishedPicture:
        """Run a task; the file is `name` and the format's suffix. `on_event` may raise Cancelled."""
        output = folder / f"{name}.{task.format}"
        with self._work():
            if isinstance(task, UpscaleTask):
                return self._upscale(task, folder, output, on_event)
            return self._render(task, folder, output, on_event)

    def load(self, model: str) -> None:
        """Load a model that the library offers, as its pictures of the trained size need it, after the task in progress."""
        path = self.library.model(model)
        side = load_spec(path).native_px
        wanted = RenderOptions(
            model=path,
            size=f"{side}x{side}",
            tiny_vae=self.settings.tiny_vae,
            device=self.device,
            vram=self.settings.vram,
            ram=self.settings.ram,
        )
        with self._work():
            load_on(self.models, wanted)

    def unload(self, after_idle: float = 0.0) -> None:
        """Let the models go, after the task in progress; the next task loads what it needs.

        after_idle: only if nothing was done for so many seconds by then.
        """
        with self.models.lock:
            if self.idle_seconds >= after_idle:
                self.models.unload()
                self.used_last, self._used_at = None, time.monotonic()

    @contextmanager
    def _work(self) -> Iterator[None]:
        """One thing at a time; idle time counts from its end."""
        with self.models.at_work(self.settings.keep_weights):
            try:
                yield
            finally:
                self._used_at = time.monotonic()

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
        picture: Path | Image.Image = source
        if upscaler == "nearest":
            picture = picture if task.refine else _nearest(source, size)
            upscaler = "lanczos"
        options = UpscaleRequest(
            size=size,
            upscaler=upscaler,
            refinement=self._redrawn(task) if task.refine else None,
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
        wanted = self._redrawn(task)
        return request_from(wanted.prompt, refinement_options(wanted, size), size, strength=wanted.strength)

    def _redrawn(self, task: UpscaleTask) -> Refinement:
        """How a task has its enlarged picture drawn over."""
        fix = None if task.colour_fix == "none" else task.colour_fix
        own = {"strength": task.strength or REFINE_STRENGTH, "tile_px": task.tile_px, "colour_fix": fix}
        own |= resolve_names(task, self.library)
        shared = {name: value for name, value in task.options(*own).items() if name in REFINEMENT}
        return Refinement(**shared | own)

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


def _on_any_device(key: FamilyKey) -> FamilyKey:
    """What networks are known by, whichever of several equal devices they are on."""
    return replace(key, device="")


def _seconds(task: AnyTask, plan: MemoryPlan) -> float:
    """What a task with a plan is expected to take, the enlarging before it included."""
    return plan.seconds / (1 - ENLARGE_SHARE) if isinstance(task, UpscaleTask) else plan.seconds


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
