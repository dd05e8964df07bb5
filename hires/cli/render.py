"""`hires render`, `edit` and `plan`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hires.cli.display import KEPT, LOST, guarded, in_flags, preview_file, progress_display, say, watched
from hires.cli.options import (
    Command,
    DrawingFlags,
    Given,
    JournalFlags,
    JsonFlags,
    MeasuringFlags,
    PreviewFlags,
    ReportFlags,
    argument,
    journal,
    keywords,
)
from hires.options.plan import PlanOptions
from hires.options.render import EditOptions, JournalOptions, RenderOptions

if TYPE_CHECKING:
    from hires.engine.results import RenderResult
    from hires.planning.plan import MemoryPlan


def register(app: typer.Typer) -> None:
    """Add the commands."""
    RENDER.add(app, "render", render)
    EDIT.add(app, "edit", edit)
    PLAN.add(app, "plan", plan)


RENDER = Command(
    arguments=(argument("prompt", "PROMPT", "What to draw."),),
    options=(RenderOptions, PreviewFlags, MeasuringFlags, JournalOptions, JournalFlags, ReportFlags),
    required=("output",),
)
EDIT = Command(
    arguments=(
        argument("picture", "IN", "The picture to change."),
        argument("instruction", "INSTRUCTION", "What to change, such as 'make it winter'."),
    ),
    options=(EditOptions, PreviewFlags, JournalOptions, JournalFlags, ReportFlags),
    required=("output",),
)
PLAN = Command(
    arguments=(argument("prompt", "[PROMPT]", "May be left out: plans do not depend on it.", ""),),
    options=(PlanOptions, JournalOptions, JournalFlags, DrawingFlags, JsonFlags),
)


def render(given: Given) -> None:
    """Render PROMPT at exactly WxH pixels into a file; with --init from a picture instead of noise."""
    from hires.engine import engine

    def work() -> RenderResult:
        files = (_path(given[name]) for name in ("preview", "profile", "memory_timeline"))
        with watched(given["quiet"], *files) as (on_event, after):
            options = keywords(RenderOptions, given) | {"journal": journal(given), "on_event": on_event}
            result = engine.render(given["prompt"], **options)
        for report in after:
            print(report(result.plan), file=sys.stderr)
        return result

    stopped = LOST if given["no_journal"] else KEPT
    say(guarded(work, stopped, RENDER.options), given["as_json"], given["quiet"])


def edit(given: Given) -> None:
    """Change the picture IN as INSTRUCTION says, at its own size or WxH, into a file."""
    from hires.engine import engine

    def work() -> RenderResult:
        with progress_display(shown=not given["quiet"], preview=preview_file(_path(given["preview"]))) as on_event:
            options = keywords(EditOptions, given) | {"journal": journal(given), "on_event": on_event}
            return engine.edit(given["picture"], given["instruction"], **options)

    stopped = LOST if given["no_journal"] else KEPT
    say(guarded(work, stopped, EDIT.options), given["as_json"], given["quiet"])


def plan(given: Given) -> None:
    """Print what `hires render`, `edit` or `upscale --refine` would do, and why, without doing it.

    Of pictures only the size is read. With --vram also for a card that is elsewhere.
    """
    from hires.engine import engine
    from hires.planning import drawing

    def planned(budget: str | int | None) -> MemoryPlan:
        options = keywords(PlanOptions, given) | {"journal": journal(given), "vram": budget}
        return engine.plan(given["prompt"], **options)

    result = guarded(lambda: planned(given["vram"]), options=PLAN.options)
    for name in ("svg", "png"):
        if given[name] is not None:
            guarded(partial(drawing.save_drawing, result, Path(given[name])))
    if given["as_json"]:
        print(json.dumps(result.to_json(), default=str))
        return
    print(in_flags(result.explain(), PLAN.options, report=True))
    print(drawing.terminal(result))
    if given["device"] == "auto" and given["vram"] is not None:
        print("with other budgets:")
        print(drawing.table(drawing.other_budgets(planned)))


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)
