"""What is known of an A1111 request while its body is translated to tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hires.checkpoints.spec import load_spec
from hires.server.a1111.fields import Drawing, Img2Img
from hires.server.a1111.scripts import ScriptSettings
from hires.server.bodies import AnyTask
from hires.server.job import Job
from hires.server.pictures import store_png

INIT_STRENGTH = 0.75
"""A1111's strength where a client sends none."""


@dataclass(slots=True, kw_only=True)
class TranslatedRequest:
    """A body as tasks."""

    tasks: list[AnyTask] = field(default_factory=list)
    model: str
    """What the engine takes as the model."""
    notes: list[str] = field(default_factory=list)
    """What is done in another way than the client asked for."""
    ignored: list[str] = field(default_factory=list)
    """The fields that ask for something this server does not do."""
    finish: Callable[[Job], None] = lambda job: None
    """What is left to do with the files of the finished job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRequest:
    """An img2img body with what was read from it."""

    body: Img2Img
    translated: TranslatedRequest
    options: dict[str, object]
    """Those that tasks of all kinds share."""
    script: ScriptSettings
    folder: Path
    """Where the pictures of the tasks are written."""

    def save(self, picture: Image.Image, name: str) -> str:
        """Write a picture of a task as a PNG of that name, and return the name."""
        return store_png(picture, self.folder, name)

    @property
    def strength(self) -> float:
        """How much of the pictures is drawn anew."""
        return redraw_strength(self.body, self.translated.model)


def redraw_strength(body: Drawing, model: str) -> float:
    """How much is drawn anew; a strength that leaves none of the steps takes one, as A1111's does."""
    strength = INIT_STRENGTH if body.denoising_strength is None else body.denoising_strength
    return max(strength, 1 / (body.steps or load_spec(model).defaults.steps))
