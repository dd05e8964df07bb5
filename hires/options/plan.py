"""The options of `plan`: all that `render`, `edit` and `upscale` take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hires.errors import RequestError
from hires.options.declarations import COLOUR_FIXES, EditingOptions
from hires.options.fields import Option, PictureLike, check
from hires.options.render import RenderOptions
from hires.options.upscale import EnlargingOptions, check_scale


@dataclass(frozen=True, kw_only=True)
class PlanOptions(EnlargingOptions, EditingOptions, RenderOptions):
    """The options of `hires.plan`. Of pictures only the size is read; what a plan does not depend on is checked too."""

    picture: Annotated[
        PictureLike | None, Option(help="The picture to edit, or to enlarge with --refine.", metavar="IMAGE")
    ] = None
    colour_fix: Annotated[
        str | None,
        Option(
            help="wavelet or adain: the colours of --init, or of the base picture, for the finished picture; none, of an "
            "enlargement: its own.",
            metavar="NAME",
            choices=(*COLOUR_FIXES, "none"),
            panel="Quality",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)
        check_scale(self)
        if self.picture is not None and self.init is not None:
            raise RequestError("picture: is to be edited or enlarged, and `init` to start a render from; give one of the two")

    @property
    def enlarges(self) -> bool:
        """Whether an enlargement is planned."""
        return self.refine or self.scale is not None or self.upscaler != "lanczos"
