"""A render with everything that belongs to it.

Its request, model and images, where it runs and where it goes. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hires.checkpoints.spec import ModelSpec
from hires.engine.output import Delivery
from hires.events import Event, OnEvent
from hires.options.render import JournalOptions, RenderRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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


NO_IMAGES = Images()


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
    following: tuple[str, ...] = ()
    """Prompts of renders that come after, encoded along while the text encoders are loaded."""

    def tell(self, event: Event) -> None:
        """Hand an event to whoever listens."""
        if self.on_event is not None:
            self.on_event(event)
