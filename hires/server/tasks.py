"""What a job is made of: one picture each, to render, to edit or to enlarge. The bodies of `POST /jobs`, and what is stored.

Pictures come in base64 and are stored as files of the job's folder, whose names stand in their place from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from hires.errors import RequestError, SizeError
from hires.options.render import PRESETS, RenderRequest
from hires.options.sizes import parse_size
from hires.options.stage import StageSpec
from hires.server.pictures import from_base64, kept, linked
from hires.server.settings import PROMPT_CHARACTERS, Library, Limits
from hires.tiling.geometry import Size
from hires.units import parse_bytes

Text = Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
Name = Annotated[str, Field(max_length=300)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class Task(BaseModel):
    """What every kind of picture has. seed: None draws one. vram: at most the server's own budget."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    pictures: ClassVar[tuple[str, ...]] = ()

    prompt: Text = ""
    negative: Text = ""
    model: Name | None = None
    seed: Seed | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    preset: Literal["fast", "balanced", "best"] = "balanced"
    loras: Annotated[list[Name], Field(max_length=32)] = []
    vram: Annotated[str, Field(max_length=40)] | None = None
    format: Literal["png", "jpg", "webp", "tif"] = "png"
    bits: Literal[8, 16] | None = None

    def stored(self, folder: Path, limits: Limits, prefix: str = "") -> Any:
        """The same task with its pictures written to files of a folder. RequestError for a picture that is none."""
        names = {}
        for field in self.pictures:
            text = getattr(self, field)
            if text is not None:
                names[field] = kept(from_base64(text, limits, field), folder, f"{prefix}{field}.png")
        return self.model_copy(update=names)

    def moved(self, folder: Path, to: Path) -> Any:
        """The same task, the files of its pictures linked from a folder into that of its job."""
        to.mkdir(parents=True, exist_ok=True)
        for name in {getattr(self, field) for field in self.pictures} - {None}:
            with contextlib.suppress(FileExistsError):  # pictures of one job share it
                linked(folder / name, to / name)
        return self


class RenderTask(Task):
    """As `hires.render`. init, mask: pictures; mask: white where `init` is drawn anew, the rest of it stays as it is."""

    pictures: ClassVar[tuple[str, ...]] = ("init", "mask", "control")

    kind: Literal["render"] = "render"
    size: Annotated[str, Field(max_length=40)] | None = None
    init: str | None = None
    mask: str | None = None
    control: str | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    sampler: Name | None = None
    schedule: Name | None = None
    strategy: Literal["auto", "direct", "tiled", "progressive"] = "auto"
    tile_px: Annotated[int, Field(ge=1, le=65_536)] | None = None
    overlap_px: Annotated[int, Field(ge=0, le=65_536)] | None = None
    sigma_max: float | Literal["auto"] | None = None
    attention_policy: Name | None = None
    relay: Name | None = None
    stages: Annotated[list[Name], Field(max_length=16)] = []
    colour_fix: Literal["wavelet", "adain"] | None = None
    clean_caption: bool = False


class EditTask(Task):
    """As `hires.edit`: `picture` changed as `prompt` says."""

    pictures: ClassVar[tuple[str, ...]] = ("picture",)

    kind: Literal["edit"] = "edit"
    picture: str
    size: Annotated[str, Field(max_length=40)] | None = None
    image_guidance: Annotated[float, Field(gt=0, le=100)] | None = None
    sampler: Name | None = None
    schedule: Name | None = None
    strategy: Literal["auto", "direct", "tiled", "progressive"] = "auto"
    tile_px: Annotated[int, Field(ge=1, le=65_536)] | None = None
    overlap_px: Annotated[int, Field(ge=0, le=65_536)] | None = None


class UpscaleTask(Task):
    """As `hires.upscale`: `picture` enlarged by `scale` or to `size`, then drawn over where `refine` is set.

    mixed: another upscaler and its share of the result.
    """

    pictures: ClassVar[tuple[str, ...]] = ("picture",)

    kind: Literal["upscale"] = "upscale"
    picture: str
    scale: Annotated[float, Field(gt=0, le=64)] | None = None
    size: Annotated[str, Field(max_length=40)] | None = None
    upscaler: Name | None = None
    mixed: tuple[Name, Annotated[float, Field(ge=0, le=1)]] | None = None
    refine: bool = False
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    tile_px: Annotated[int, Field(ge=1, le=65_536)] | None = None
    colour_fix: Literal["wavelet", "adain"] | None = "wavelet"


AnyTask = Annotated[RenderTask | EditTask | UpscaleTask, Field(discriminator="kind")]
assert set(PRESETS) == {"fast", "balanced", "best"}


def size_of(task: RenderTask | EditTask, limits: Limits, picture: tuple[int, int] | None) -> Size:
    """The size that is asked for, else the picture's, (width, height). SizeError where it is over the server's limit."""
    if task.size is not None:
        size = parse_size(task.size)
    elif picture is not None:
        size = Size(picture[1], picture[0])
    else:
        raise SizeError("no size: give size as WIDTHxHEIGHT, such as 4096x4096")
    return allowed(size, limits)


def allowed(size: Size, limits: Limits) -> Size:
    if size.area > limits.output_pixels or max(size.height, size.width) > limits.side_px:
        most = f"{limits.output_pixels / 1e6:.0f} megapixels and {limits.side_px} px a side"
        raise SizeError(f"size {size}: is over this server's limit of {most}; ask for a smaller one")
    return size


def budget(task: Task, own: str | None) -> str | None:
    """The memory budget of a task: what it asks for, at most the server's own. RequestError for what is no amount."""
    if task.vram is None:
        return own
    if own is not None and parse_bytes(task.vram) > parse_bytes(own):
        raise RequestError(f"vram {task.vram}: this server has {own}; ask for that or less")
    return task.vram


def request_of(task: RenderTask | EditTask, size: Size, library: Library) -> RenderRequest:
    """What the planner is asked. RequestError for values out of range and names that are not offered."""
    from hires.options.stage_text import parse_stage

    common: dict[str, Any] = {
        "prompt": task.prompt,
        "negative": task.negative,
        "size": size,
        "model": library.model(task.model),
        "seed": task.seed or 0,
        "loras": tuple(library.lora(name) for name in task.loras),
        "tiny_vae": library.settings.tiny_vae,
    }
    same = ("steps", "guidance", "preset", "sampler", "schedule", "strategy", "tile_px", "overlap_px")
    common |= {name: getattr(task, name) for name in same}
    if isinstance(task, EditTask):
        return RenderRequest(**common, image_guidance=task.image_guidance)
    relay = StageSpec() if task.relay is None else parse_stage(task.relay, "relay")
    return RenderRequest(
        **common,
        strength=(task.strength or 0.5) if task.init is not None else None,
        sigma_max=task.sigma_max,
        attention_policy=task.attention_policy,
        relay=relay,
        stages=tuple(parse_stage(stage, "stage") for stage in task.stages),
        colour_fix=task.colour_fix,
        clean_caption=task.clean_caption,
    )


def seeded(tasks: list[Any], draw: Callable[[], int]) -> Iterator[Any]:
    """The same tasks, each with a seed."""
    for task in tasks:
        yield task if task.seed is not None else task.model_copy(update={"seed": draw()})
