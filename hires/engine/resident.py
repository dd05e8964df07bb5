"""A model that stays loaded from one render to the next: `hires.load`."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

from hires._imports import collection_paused
from hires.engine.engine import edit_on, plan_of, render_job, render_on, run_on
from hires.engine.job import RenderJob
from hires.engine.requests import check_amount, request_from, spec_for
from hires.engine.results import RenderResult, UpscaleResult
from hires.errors import RequestError
from hires.events import Event, OnEvent
from hires.options.declarations import LoadOptions
from hires.options.fields import PictureLike, chosen, declared
from hires.options.keywords import EditKeywords, LoadKeywords, PlanKeywords, RenderKeywords, UpscaleKeywords
from hires.options.plan import PlanOptions
from hires.options.render import EditOptions, RenderOptions
from hires.options.table import with_options
from hires.options.upscale import UpscaleOptions
from hires.planning.plan import MemoryPlan
from hires.planning.planner import PICTURES_TOGETHER
from hires.tiling.geometry import Size
from hires.units import gib

if TYPE_CHECKING:
    from hires.engine.background import Run
    from hires.engine.job import RenderJob
    from hires.engine.loaded import LoadedModels

Chosen = TypeVar("Chosen")
ENCODED_AHEAD = 32
"""Prompts of `render_many` that are encoded while the text encoders are loaded: some megabytes each."""


@with_options(LoadOptions)
def load(model: str = "demo", **options: Unpack[LoadKeywords]) -> Engine:
    """A model that stays loaded: its renders after the first load nothing.

    Reads the headers of the model's files; weights come with the first render. Use it as a context manager, or `close` it.

    Args:
        model: as `render` takes it.
        **options: listed below; what belongs to the picture is given to `Engine.render`.

    Raises:
        RequestError: a value or a file that cannot be used; a device that this machine lacks is told by the first render.
    """
    return Engine({"model": model, **options})


class Engine:
    """A view of one model on one device, kept from one render to the next.

    A used engine draws what a fresh process draws, bit for bit. Renders on one device wait for each other, whatever the engine
    and the thread, and models of all engines on it share its memory: the least recently used one goes first. A render that
    fails or is cancelled leaves the engine usable; a file that changed on disk is loaded again, and other LoRAs are merged
    into what is loaded. A closed engine is a RequestError.

    Args:
        options: those of `load`, by name.
    """

    def __init__(self, options: Mapping[str, object]) -> None:
        wanted = chosen(LoadOptions, "load", options)
        for name in ("vram", "ram"):
            check_amount(name, getattr(wanted, name))
        self._options = {name: value for name, value in options.items() if value is not None}
        shared = declared(LoadOptions).keys() & declared(RenderOptions).keys()
        render_options = RenderOptions(**{name: getattr(wanted, name) for name in shared})
        self.spec = spec_for(request_from("", render_options, Size(512, 512)))
        """The checkpoint, by its headers."""
        self._device, self._keep_weights = wanted.device, wanted.keep_weights
        self._models: LoadedModels | None = None
        self._finding = threading.Lock()
        self._last_run: weakref.ref[Run] | None = None
        self._closed = False

    @property
    def loaded(self) -> tuple[str, ...]:
        """The names of the models whose weights are in memory on the device, those of other engines included."""
        return () if self._models is None else self._models.names

    def plan(self, prompt: str = "", **options: Unpack[PlanKeywords]) -> MemoryPlan:
        """What `render`, `edit` or `upscale` would do with the same options; see `hires.plan`."""
        held = 0 if self._models is None else self._models.device_bytes
        return plan_of(prompt, self._options_of(PlanOptions, "plan", options), held)

    def render(self, prompt: str, **options: Unpack[RenderKeywords]) -> RenderResult:
        """Render a prompt; see `hires.render`."""
        wanted = self._options_of(RenderOptions, "render", options)
        with self._models_at_work() as models:
            return render_on(models, prompt, wanted)

    def carry_out(self, job: RenderJob) -> RenderResult:
        """Render a job that `engine.render_job` made for this model."""
        with self._models_at_work() as models:
            return run_on(models, job)

    def render_many(self, prompts: Iterable[str], **options: Unpack[RenderKeywords]) -> Iterator[RenderResult]:
        """Render several prompts with the same options, one result after the other.

        The text encoders work for `ENCODED_AHEAD` prompts at once, and base pictures share batches of the network where that
        saves calls of it: each picture is that of `render` to the rounding of another batch, at most a level of 255 here and
        there on a CPU. RequestError for `output`, which would be one file for all.
        """
        wanted = self._options_of(RenderOptions, "render_many", options)
        if isinstance(prompts, str):
            raise RequestError(f"prompts {prompts[:80]!r}: is one prompt; give a list of them, or use render")
        if wanted.output is not None:
            raise RequestError(f"output {wanted.output}: would be one file for all pictures; save each result")
        return self._render_jobs(wanted, [*prompts])

    def _render_jobs(self, wanted: RenderOptions, prompts: Sequence[str]) -> Iterator[RenderResult]:
        """The results of prompts in turn; the engine is free for others between them."""
        jobs: list[RenderJob] = []
        for index in range(len(prompts)):
            with self._models_at_work() as models:
                if not jobs:
                    jobs = self._next_jobs(models, wanted, prompts[index:])
                result = run_on(models, jobs.pop(0))
            yield result

    def _next_jobs(self, models: LoadedModels, wanted: RenderOptions, prompts: Sequence[str]) -> list[RenderJob]:
        """The jobs of the next prompts, with their first stages where they can be drawn together."""
        from hires.engine.run import with_shared_bases

        first = render_job(prompts[0], wanted, prompts[1:ENCODED_AHEAD])
        others = [render_job(prompt, wanted) for prompt in prompts[1:PICTURES_TOGETHER]]
        return with_shared_bases([first, *others], models)

    def edit(self, picture: PictureLike, instruction: str, **options: Unpack[EditKeywords]) -> RenderResult:
        """Change a picture as an instruction says; see `hires.edit`."""
        wanted = self._options_of(EditOptions, "edit", options)
        with self._models_at_work() as models:
            return edit_on(models, picture, instruction, wanted)

    def upscale(self, image: PictureLike, **options: Unpack[UpscaleKeywords]) -> UpscaleResult:
        """Enlarge a picture, and draw over it with `refine`; see `hires.upscale`."""
        wanted = self._options_of(UpscaleOptions, "upscale", options)
        with self._models_at_work() as models:
            from hires.engine.upscale import upscale_on

            return upscale_on(models, image, wanted)

    def start(self, prompt: str, **options: Unpack[RenderKeywords]) -> Run:
        """Render in the background, after the runs that were started before.

        Returns:
            A Run: the events of the render as they come, and its result.
        """
        wanted = self._options_of(RenderOptions, "start", options)
        if self._closed:
            raise closed()
        from hires.engine.background import Run

        def work(on_event: OnEvent) -> RenderResult:
            told = wanted.on_event
            heard = on_event if told is None else _both(told, on_event)
            listening: RenderKeywords = {**options, "on_event": heard}
            return self.render(prompt, **listening)

        run = Run(work, None if self._last_run is None else self._last_run())
        self._last_run = weakref.ref(run)
        return run

    def unload(self) -> None:
        """Let the model's weights go; the next render loads them again."""
        if self._models is not None:
            with self._models.lock:
                self._models.unload(str(self.spec.path))

    def close(self) -> None:
        """Let the model's weights go, for good; they stay where another engine views the same model."""
        self._closed = True
        with self._finding:
            models, self._models = self._models, None
        if models is not None and models.leave(self):
            with models.lock:
                models.unload(str(self.spec.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            state = "closed"
        elif self._models is None or not (held := self._models.weight_bytes_of[str(self.spec.path)]):
            state = "nothing loaded yet"
        else:
            state = f"{gib(held)} of weights in memory"
        return f"<hires.Engine {self.spec.name}, {self.spec.facts.title}, {state}>"

    def _options_of(self, cls: type[Chosen], function: str, options: Mapping[str, object]) -> Chosen:
        """The options of a call beside those of `load`. RequestError for one that belongs to `load`."""
        own = declared(LoadOptions).keys() & options.keys()
        if own:
            raise RequestError(f"{sorted(own)[0]}: belongs to the model or the machine; give it to hires.load")
        shared = {name: value for name, value in self._options.items() if name in declared(cls)}
        return chosen(cls, function, {**shared, **options})

    @contextmanager
    def _models_at_work(self) -> Iterator[LoadedModels]:
        """What is loaded on the device, for one request at a time."""
        models = self._models_here()
        with models.at_work(self._keep_weights):
            if self._closed:
                raise closed()
            yield models

    def _models_here(self) -> LoadedModels:
        with self._finding:
            if self._closed:
                raise closed()
            if self._models is None:
                with collection_paused():
                    from hires.devices.probe import choose_device
                    from hires.engine.loaded import models_on

                self._models = models_on(str(choose_device(self._device)))
                self._models.view(self, str(self.spec.path))
            return self._models


def closed() -> RequestError:
    """The error of a call on a closed engine."""
    return RequestError("engine: is closed; load the model again with hires.load")


def _both(first: OnEvent, second: OnEvent) -> OnEvent:
    def hear(event: Event) -> None:
        first(event)
        second(event)

    return hear
