"""`hires render`, `edit` and `plan`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hires.cli import batch
from hires.cli.display import KEPT, LOST, guarded, in_flags, preview_file, progress_display, say, watched
from hires.cli.options import (
    BatchFlags,
    Command,
    CountFlags,
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
from hires.errors import RequestError
from hires.options.fields import chosen, declared
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


OUTPUT = declared(RenderOptions)["output"].option
RENDER = Command(
    arguments=(argument("prompts", "PROMPT...", "What to draw; several prompts are several pictures.", kind=list[str]),),
    options=(
        RenderOptions,
        CountFlags,
        BatchFlags,
        PreviewFlags,
        MeasuringFlags,
        JournalOptions,
        JournalFlags,
        ReportFlags,
    ),
    required=("output",),
    changes={
        "output": replace(
            OUTPUT,
            help="The file to write: .png, .tif, .jpg, .webp. Several pictures: a folder, or a name that gets numbers.",
        ),
        "suffix": replace(declared(BatchFlags)["suffix"].option, help="Format of several pictures in a folder; default: .png."),
    },
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
    """Render PROMPT at exactly WxH pixels into a file; with --init from a picture instead of noise.

    Several prompts, or --count, give several pictures, with the model loaded once: in a folder FILE, named by prompt and seed,
    or as FILE-1.png, FILE-2.png, ... The same command goes on after a stop and skips what is finished.
    """
    if len(given["prompts"]) > 1 or given["count"] is not None:
        render_several(given)
    else:
        render_one(given)


def render_one(given: Given) -> None:
    """Render the prompt into the file that is named."""
    from hires.engine import engine

    def work() -> RenderResult:
        if given["suffix"] is not None:
            raise RequestError(f"suffix {given['suffix']}: is of several pictures; give the name's own ending with `output`")
        files = (_path(given[name]) for name in ("preview", *MEASURING))
        with watched(given["quiet"], *files) as (on_event, after):
            options = keywords(RenderOptions, given) | {"journal": journal(given), "on_event": on_event}
            result = engine.render(given["prompts"][0], **options)
        for report in after:
            print(report(result.plan), file=sys.stderr)
        return result

    stopped = LOST if given["no_journal"] else KEPT
    say(guarded(work, stopped, RENDER.options), given["as_json"], given["quiet"])


MEASURING = tuple(declared(MeasuringFlags))
STOPPED = "finished pictures stay, the same command goes on from here (see hires jobs)"
STOPPED_LOST = "finished pictures stay, the one in progress is lost"


def render_several(given: Given) -> None:
    """Render each prompt with each seed; what is finished is told whatever stops the others. Exit code 1 where one failed."""

    def work() -> None:
        for name in MEASURING:
            if given[name] is not None:
                raise RequestError(f"{name} {given[name]}: is of one picture; give one prompt without `count`, or leave it out")
        preview = preview_file(_path(given["preview"]))
        options = chosen(RenderOptions, "render", keywords(RenderOptions, given) | {"journal": journal(given)})
        count = CountFlags(**keywords(CountFlags, given)).count or 1
        place = batch.Place.of(str(options.output), given["suffix"])
        pictures = batch.pictures_of(given["prompts"], range(options.seed, options.seed + count), place)
        drawn = batch.checked(pictures, options, place)
        report.begin(drawn)
        batch.draw(drawn, options, report, preview)

    report = batch.Report(options=RENDER.options, as_json=given["as_json"], quiet=given["quiet"])
    try:
        guarded(work, STOPPED_LOST if given["no_journal"] else STOPPED, RENDER.options)
    except typer.Exit as end:
        if end.exit_code != RequestError.exit_code:  # with that one nothing was drawn
            report.end()
        raise
    report.end()
    if report.failed:
        raise typer.Exit(1)


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
