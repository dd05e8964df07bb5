"""Renders, edits and plans: plan, load, run, decode, write.

What the command line and Python call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from hires._imports import collection_paused
from hires.checkpoints.locate import missing
from hires.checkpoints.model import ModelSpec
from hires.devices.describe import budget_of, describe_device
from hires.engine.job import NO_IMAGES, Images, RenderJob
from hires.engine.output import delivery
from hires.engine.requests import (
    edges_of,
    editing,
    encoded_ahead,
    later_requests,
    picture_of,
    planned,
    request_from,
    size_of,
    spec_for,
    start_strength,
    text_to_image,
    with_captions,
)
from hires.engine.results import RenderResult
from hires.options.fields import PictureLike, chosen
from hires.options.keywords import EditKeywords, PlanKeywords, RenderKeywords
from hires.options.plan import PlanOptions
from hires.options.render import EditOptions, RenderOptions, RenderRequest
from hires.options.table import with_options
from hires.planning import planner
from hires.planning.plan import MemoryPlan
from hires.tiling.geometry import Size

if TYPE_CHECKING:
    from hires.engine.loaded import LoadedModels


@with_options(RenderOptions)
def render(prompt: str, **options: Unpack[RenderKeywords]) -> RenderResult:
    """Render a prompt at exactly `size` and return the result.

    With `output` a file is written while the picture is decoded; it holds prompt and plan and appears whole or not at all.
    Without one the picture stays in memory.

    Pictures (`init`, `mask`, `control`) are paths, PIL images or (height, width, 3) uint8. They fill the size, cut evenly where
    their shape is another. `size` is "4096x4096" (WIDTHxHEIGHT), a (width, height) pair or a Size(height, width), in pixels.

    Args:
        prompt: what to draw.
        **options: listed below; the docs' table of options tells where else each is taken.

    Returns:
        A RenderResult; its `pixels` are (height, width, 3) uint8 or uint16, read from the file where there is one.

    Raises:
        RequestError: a value that cannot be carried out; nothing was rendered. The message begins with the option's name.
        RunError: memory or disk ran out on the way; no file was written.
        Cancelled: raised by `on_event`.
    """
    return render_on(None, prompt, chosen(RenderOptions, "render", options))


@with_options(EditOptions)
def edit(picture: PictureLike, instruction: str, *, model: str, **options: Unpack[EditKeywords]) -> RenderResult:
    """Change a picture as an instruction says, with a model that edits (CosXL-Edit).

    Args:
        picture: a path, a PIL image or (height, width, 3) uint8; it fills `size`, by default its own, cut evenly where its
            shape is another.
        instruction: what to change, such as "make it winter".
        model: a model that edits, such as cosxl_edit.safetensors.
        **options: listed below. `guidance` is how strictly to follow the instruction.

    Raises:
        RequestError, RunError, Cancelled: as `render` does; RequestError also for a model that only draws from text.
    """
    return edit_on(None, picture, instruction, chosen(EditOptions, "edit", {"model": model, **options}))


@with_options(PlanOptions)
def plan(prompt: str = "", **options: Unpack[PlanKeywords]) -> MemoryPlan:
    """What `render`, `edit` or `upscale` would do with the same options, without loading weights.

    Of pictures only the size is read. An edit is planned with a model that edits (and `picture`), an enlargement with
    `picture` and `refine`. With a `vram` and device "auto" the plan is for a card of that size, here or elsewhere, and torch is
    not imported; name the device to plan for this machine with that budget. RequestError as for `render`.
    """
    return plan_of(prompt, chosen(PlanOptions, "plan", options))


def plan_of(prompt: str, wanted: PlanOptions, own_bytes: int = 0) -> MemoryPlan:
    """The plan of options that are already checked; own_bytes as in `describe_device`, errors as in `plan`."""
    request, spec = planned(prompt, wanted)
    if wanted.output is not None:
        delivery(wanted.output, wanted.overwrite, request.size, wanted.bits)
    device = describe_device(wanted.device, budget_of(wanted.vram), budget_of(wanted.ram), own_bytes)
    return planner.plan(with_captions(request), spec, device)


def render_on(models: LoadedModels | None, prompt: str, wanted: RenderOptions) -> RenderResult:
    """A render with what `models` holds, or with a model of its own; errors as in `render`."""
    return run_on(models, render_job(prompt, wanted))


def render_job(prompt: str, wanted: RenderOptions, following: Sequence[str] = ()) -> RenderJob:
    """A render, its output checked; errors as in `render`.

    following: prompts that come after, encoded along while the text encoders are loaded.
    """
    strength = start_strength(wanted)
    picture = None if wanted.init is None else picture_of(wanted.init)
    size = size_of(wanted.size, None if picture is None else Size(*picture.shape[:2]))
    request = request_from(prompt, wanted, size, strength=strength)
    spec = text_to_image(spec_for(request), prompt)
    images = Images(
        init=picture,
        edges=edges_of(wanted.control, spec),
        mask=None if wanted.mask is None else picture_of(wanted.mask),
    )
    return _job(request, spec, images, wanted, tuple(following))


def load_on(models: LoadedModels, wanted: RenderOptions) -> None:
    """Load what a render needs without rendering, so that it finds its networks in memory; errors as in `render`.

    Text encoders are loaded along where they stay. A model that edits is loaded as well.
    """
    request = request_from("", wanted, size_of(wanted.size, None))
    spec = spec_for(request)
    if spec.missing:
        raise missing(spec.missing, spec.facts)
    device = describe_device(wanted.device, budget_of(wanted.vram), budget_of(wanted.ram), models.device_bytes)
    models.load(_job(request, spec, NO_IMAGES, wanted), planner.plan(request, spec, device))


def check_runs(job: RenderJob) -> None:
    """Plan a job on this machine, so that what cannot run is an error before anything is drawn. RequestError then."""
    from hires.devices.probe import choose_device

    if job.spec.missing:
        raise missing(job.spec.missing, job.spec.facts)
    device = describe_device(str(choose_device(job.device)), budget_of(job.vram), budget_of(job.ram))
    planner.plan(with_captions(job.request), job.spec, device)


def edit_on(models: LoadedModels | None, picture: PictureLike, instruction: str, wanted: EditOptions) -> RenderResult:
    """An edit with what `models` holds, or with a model of its own; errors as in `edit`."""
    pixels = picture_of(picture)
    request = request_from(instruction, wanted, size_of(wanted.size, Size(*pixels.shape[:2])))
    return run_on(models, _job(request, editing(spec_for(request)), Images(init=pixels), wanted))


def run_on(models: LoadedModels | None, job: RenderJob) -> RenderResult:
    """The result of a job; torch is imported only here."""
    with collection_paused():
        from hires.engine.run import run

    return run(job, models)


def _job(
    request: RenderRequest,
    spec: ModelSpec,
    images: Images,
    options: RenderOptions | EditOptions,
    following: tuple[str, ...] = (),
) -> RenderJob:
    """The job of a request; its output is checked here."""
    return RenderJob(
        request=request,
        spec=spec,
        output=delivery(options.output, options.overwrite, request.size, options.bits),
        images=images,
        device=options.device,
        vram=options.vram,
        ram=options.ram,
        journal=options.journal,
        on_event=options.on_event,
        following=encoded_ahead(request, later_requests(request, options, following)),
    )
