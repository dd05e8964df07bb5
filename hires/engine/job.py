"""A render with everything that belongs to it.

Its request, model and images, where it runs and where it goes. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hires.checkpoints.model import ModelSpec
from hires.engine.output import Delivery
from hires.events import Event, OnEvent, StageStats
from hires.options.render import JournalOptions, RenderRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images that a render is given, each (H, W, 3) uint8 or None."""

    init: Image | None = None
    """What the render starts from, or edits."""
    edges: Image | None = None
    """White edges on black that a ControlNet follows."""
    mask: Image | None = None
    """White where `init` is drawn anew; elsewhere its pixels stay as they are."""

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return any(image is not None for image in (self.init, self.edges, self.mask))


NO_IMAGES = Images()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBase:
    """The first stage of a picture that was drawn in the same batches as others."""

    latents: Tensor
    """(1, C, h, w) float32 on the CPU."""
    stats: StageStats
    """What it took; of the seconds the picture's share."""
    pictures: int = 1
    """How many pictures' work this one's listener heard of: that of all for the first picture, its own for the others."""
    peak_bytes: int
    """The predicted peak of all pictures together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderJob:
    """One render, before it is known what the device can do."""

    request: RenderRequest
    spec: ModelSpec
    output: Delivery
    images: Images = NO_IMAGES
    device: str = "auto"
    vram: str | int | None = None
    ram: str | int | None = None
    journal: JournalOptions | None = None
    """How unfinished work is kept beside the output; None keeps nothing."""
    on_event: OnEvent | None = None
    following: tuple[RenderRequest, ...] = ()
    """Renders that come after, their prompts encoded along while the text encoders are loaded."""
    base: SharedBase | None = None
    """Its first stage, where that is done."""

    def tell(self, event: Event) -> None:
        """Hand an event to whoever listens."""
        if self.on_event is not None:
            self.on_event(event)
