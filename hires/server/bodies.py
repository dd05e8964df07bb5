"""The bodies of `POST /jobs`: pictures to render, to edit or to enlarge.

A body has a `kind`, the fields of its class here, and every option of its command that is not local, as
`hires/options/declarations.py` declares it; `NARROWER` names those that a server bounds further. `job.json` stores the bodies
as tasks. Pictures come in base64 and are stored as files of the job's folder, whose names replace them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from hires.engine.requests import STRENGTH, request_from
from hires.errors import RequestError, SizeError
from hires.options.fields import Field as OptionField
from hires.options.fields import PictureLike, declared
from hires.options.render import EditOptions, RenderOptions, RenderRequest
from hires.options.sizes import parse_size
from hires.options.upscale import UpscaleOptions
from hires.server.pictures import check_sum, from_base64, link, store_png
from hires.server.settings import PROMPT_CHARACTERS, Library, Limits
from hires.tiling.geometry import Size
from hires.units import parse_bytes

Text = Annotated[str, Field(max_length=PROMPT_CHARACTERS)]
Name = Annotated[str, Field(max_length=300)]
Short = Annotated[str, Field(max_length=40)]

NARROWER: dict[str, tuple[object, object]] = {
    "model": (Name | None, None),  # None: the server's default
    "upscaler": (Name | None, None),
    "seed": (Annotated[int, Field(ge=0, lt=2**63, strict=True)] | None, None),  # None draws one
    "size": (Short | None, None),
    "vram": (Short | None, None),  # at most the server's own
    "negative": (Text, ""),
    "prompt": (Text, ""),
    "loras": (Annotated[list[Name], Field(max_length=32)], []),
    "stages": (Annotated[list[Name], Field(max_length=16)], []),
    "relay": (Name | None, None),
    "tile_px": (Annotated[int, Field(ge=1, le=65_536)] | None, None),
    "overlap_px": (Annotated[int, Field(ge=0, le=65_536)] | None, None),
    "scale": (Annotated[float, Field(gt=0, le=64)] | None, None),
    "sigma_max": (float | Literal["auto"] | None, None),
}
"""Type and default that a server takes instead of the declared ones: shorter texts, names that it offers, its own defaults."""


class Task(BaseModel):
    """What every kind of picture has; its options come from the declarations."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    pictures: ClassVar[tuple[str, ...]] = ()
    """The fields that are pictures."""
    declaration: ClassVar[type]
    """The class that declares the options."""

    prompt: Text = ""
    format: Literal["png", "jpg", "webp", "tif"] = "png"

    if TYPE_CHECKING:  # the declared options

        def __init__(self, **values: object) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def options(self, *without: str) -> dict[str, Any]:
        """The values of the declared options that this task has, except those named."""
        names = declared(self.declaration)
        return {name: getattr(self, name) for name in names if name in type(self).model_fields and name not in without}

    def store_pictures(self, folder: Path, limits: Limits, prefix: str = "") -> Self:
        """The task with its pictures written into a folder. RequestError for one that cannot be read."""
        sent = {field: text for field in self.pictures if (text := getattr(self, field)) is not None}
        check_sum(sent.items(), limits)
        names = {
            field: store_png(from_base64(text, limits, field), folder, f"{prefix}{field}.png") for field, text in sent.items()
        }
        return self.model_copy(update=names)

    @property
    def has_pictures(self) -> bool:
        """Whether any picture is given."""
        return any(getattr(self, field) is not None for field in self.pictures)

    def link_pictures(self, source: Path, target: Path) -> Self:
        """The task, after the files of its pictures got a second name in the folder `target`."""
        target.mkdir(parents=True, exist_ok=True)
        for name in {getattr(self, field) for field in self.pictures} - {None}:
            with contextlib.suppress(FileExistsError):  # pictures of one job share it
                link(source / name, target / name)
        return self


def add_declared_options(cls: type[Task]) -> type[Task]:
    """The same body with the options of its declaration that are not local."""
    fields: dict[str, Any] = {}
    for name, field in declared(cls.declaration).items():
        if field.option.local or name in cls.__annotations__:
            continue
        kind, default = NARROWER.get(name) or (_json_type(field), field.default)
        fields[name] = (kind, Field(default, description=field.option.help))
    return create_model(cls.__name__, __base__=cls, __module__=__name__, __doc__=cls.__doc__, **fields)


def _json_type(field: OptionField) -> object:
    """The type of a value in JSON, with the bounds of its declaration."""
    option = field.option
    kind: Any
    if option.choices:
        kind = Literal[option.choices]
    elif bool in field.types:
        kind = bool
    elif int in field.types or float in field.types:
        bounds = {key: bound for key in ("ge", "le", "gt") if (bound := getattr(option, key)) is not None}
        kind = Annotated[float if float in field.types else int, Field(**bounds)]
    else:
        kind = str if PictureLike in field.types else Name
    return kind | None if field.optional else kind


@add_declared_options
class RenderTask(Task):
    """A render, with the options of `hires.render`.

    `init`, `mask` and `control` are pictures in base64; `mask` is white where `init` is drawn anew, and the rest of it stays.
    """

    pictures: ClassVar[tuple[str, ...]] = ("init", "mask", "control")
    declaration: ClassVar[type] = RenderOptions

    kind: Literal["render"] = "render"

    if TYPE_CHECKING:  # a type checker sees this body's own fields only

        def __init__(self, **values: object) -> None: ...


@add_declared_options
class EditTask(Task):
    """An edit, with the options of `hires.edit`: `picture`, in base64, changed as `prompt` says."""

    pictures: ClassVar[tuple[str, ...]] = ("picture",)
    declaration: ClassVar[type] = EditOptions

    kind: Literal["edit"] = "edit"
    picture: str

    if TYPE_CHECKING:  # a type checker sees this body's own fields only

        def __init__(self, **values: object) -> None: ...


@add_declared_options
class UpscaleTask(Task):
    """An enlargement, with the options of `hires.upscale`.

    `picture`, in base64, is enlarged by `scale` or to `size`, then drawn over where `refine` is set.
    """

    pictures: ClassVar[tuple[str, ...]] = ("picture",)
    declaration: ClassVar[type] = UpscaleOptions

    kind: Literal["upscale"] = "upscale"
    picture: str
    mixed: tuple[Name, Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None, description="Another upscaler and its share of the result."
    )

    if TYPE_CHECKING:  # a type checker sees this body's own fields only

        def __init__(self, **values: object) -> None: ...


AnyTask = Annotated[RenderTask | EditTask | UpscaleTask, Field(discriminator="kind")]
SomeTask = TypeVar("SomeTask", bound=Task)


def size_of(task: RenderTask | EditTask, limits: Limits, picture: tuple[int, int] | None) -> Size:
    """The task's size, else the size (width, height) of its picture. SizeError where it is over the server's limit."""
    if task.size is not None:
        size = parse_size(task.size)
    elif picture is not None:
        size = Size(picture[1], picture[0])
    else:
        raise SizeError("no size: give size as WIDTHxHEIGHT, such as 4096x4096")
    return check_limit(size, limits)


def check_limit(size: Size, limits: Limits) -> Size:
    """The same size. SizeError where it is over the server's limit."""
    if size.area > limits.output_pixels or max(size.height, size.width) > limits.side_px:
        most = f"{limits.output_pixels / 1e6:.0f} megapixels and {limits.side_px} px a side"
        raise SizeError(f"size {size}: is over this server's limit of {most}; ask for a smaller one")
    return size


def budget(task: Task, server_budget: str | None) -> str | None:
    """The memory budget of a task, by default the server's. RequestError for more than that, and for an invalid amount."""
    if task.vram is None:
        return server_budget
    if server_budget is not None and parse_bytes(task.vram) > parse_bytes(server_budget):
        raise RequestError(f"vram {task.vram}: this server has {server_budget}; ask for that or less")
    return str(task.vram)


def resolve_names(task: Task, library: Library) -> dict[str, object]:
    """The model and LoRAs of a task as paths on this server, and its seed. ModelError for a name that is not offered."""
    return {
        "model": library.model(task.model),
        "loras": tuple(library.lora(name) for name in task.loras),
        "lora_dir": library.settings.loras,
        "embeddings": library.settings.embeddings,
        "seed": task.seed or 0,
    }


def request_of(task: RenderTask | EditTask, size: Size, library: Library) -> RenderRequest:
    """The request that plans a task. RequestError for values out of range and names that are not offered."""
    own = resolve_names(task, library) | {"tiny_vae": library.settings.tiny_vae, "size": str(size)}
    values = task.options(*own) | own
    if isinstance(task, EditTask):
        return request_from(task.prompt, EditOptions(**values), size)
    strength = (task.strength or STRENGTH) if task.init is not None else None
    return request_from(task.prompt, RenderOptions(**values), size, strength=strength)


def add_seeds(tasks: Iterable[SomeTask], draw: Callable[[], int]) -> Iterator[SomeTask]:
    """The same tasks; those without a seed get one from `draw`."""
    for task in tasks:
        yield task if task.seed is not None else task.model_copy(update={"seed": draw()})


def following_seed(task: SomeTask, index: int) -> SomeTask:
    """The task for picture `index` of several: its seed, where it has one, plus the index."""
    return task if task.seed is None else task.model_copy(update={"seed": task.seed + index})


def digest(tasks: Iterable[Task]) -> str:
    """A digest that two requests share only where they ask for the same."""
    text = repr([task.model_dump(mode="json") for task in tasks])
    return hashlib.sha256(text.encode()).hexdigest()


def without_seed(task: Task) -> str:
    """A text that tasks share which differ in their seed alone."""
    return task.model_copy(update={"seed": 0}).model_dump_json()
