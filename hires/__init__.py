"""hires: 2K to 8K pictures and larger from diffusion models, planned before they run.

    import hires
    result = hires.render("a sun on the right over green mountains and a lake at dusk", size="2048x2048", output="a.png")

Importing the package loads no torch; the first render does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Client",
    "GuidePlan",
    "JournalOptions",
    "StageSpec",
    "WindowSpec",
    "__version__",
    "attach",
    "detach",
    "edit",
    "plan",
    "render",
    "upscale",
]

if TYPE_CHECKING:
    from hires.attaching import attach, detach
    from hires.client import Client
    from hires.engine import JournalOptions, edit, plan, render
    from hires.stage_spec import GuidePlan, StageSpec, WindowSpec
    from hires.upscaling import upscale


def __getattr__(name: str) -> Any:
    if name in ("JournalOptions", "edit", "plan", "render"):
        from hires import engine

        return getattr(engine, name)
    if name in ("GuidePlan", "StageSpec", "WindowSpec"):
        from hires import stage_spec

        return getattr(stage_spec, name)
    if name in ("attach", "detach"):
        from hires import attaching

        return getattr(attaching, name)
    if name == "Client":
        from hires import client

        return client.Client
    if name == "upscale":
        from hires import upscaling

        return upscaling.upscale
    raise AttributeError(f"module 'hires' has no attribute {name!r}")
