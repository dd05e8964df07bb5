"""hires: 2K to 8K pictures from diffusion models, planned before they run.

    import hires
    result = hires.render("a sun on the right over green mountains and a lake at dusk", size="2048x2048", output="a.png")

Importing the package loads no torch; the first render does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hires._version import __version__

if TYPE_CHECKING:
    from hires import errors
    from hires.checkpoints.inspect import inspect
    from hires.client import Client
    from hires.engine.background import Run
    from hires.engine.engine import edit, plan, render
    from hires.engine.resident import Engine, load
    from hires.engine.results import RenderResult
    from hires.engine.upscale import Upscaler, upscale
    from hires.events import Event
    from hires.metrics.measure_file import measure
    from hires.options.lora import LoraRef
    from hires.options.render import JournalOptions
    from hires.options.stage import GuidePlan, StageSpec, WindowSpec
    from hires.pipelines.attach import attach, detach
    from hires.planning.plan import MemoryPlan
    from hires.tiling.vae import TiledVAE

_HOMES = {
    "Client": "hires.client",
    "Engine": "hires.engine.resident",
    "Event": "hires.events",
    "GuidePlan": "hires.options.stage",
    "JournalOptions": "hires.options.render",
    "LoraRef": "hires.options.lora",
    "MemoryPlan": "hires.planning.plan",
    "RenderResult": "hires.engine.results",
    "Run": "hires.engine.background",
    "StageSpec": "hires.options.stage",
    "TiledVAE": "hires.tiling.vae",
    "Upscaler": "hires.engine.upscale",
    "WindowSpec": "hires.options.stage",
    "attach": "hires.pipelines.attach",
    "detach": "hires.pipelines.attach",
    "edit": "hires.engine.engine",
    "errors": "hires.errors",
    "inspect": "hires.checkpoints.inspect",
    "load": "hires.engine.resident",
    "measure": "hires.metrics.measure_file",
    "plan": "hires.engine.engine",
    "render": "hires.engine.engine",
    "upscale": "hires.engine.upscale",
}
"""Where each public name is defined; a module is imported when one of its names is first used."""

__all__ = [
    "Client",
    "Engine",
    "Event",
    "GuidePlan",
    "JournalOptions",
    "LoraRef",
    "MemoryPlan",
    "RenderResult",
    "Run",
    "StageSpec",
    "TiledVAE",
    "Upscaler",
    "WindowSpec",
    "__version__",
    "attach",
    "detach",
    "edit",
    "errors",
    "inspect",
    "load",
    "measure",
    "plan",
    "render",
    "upscale",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hires' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if _HOMES[name] == f"hires.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
