"""What a command shows while it works and when it is done, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from hires._version import __version__
from hires.errors import HiresError, RequestError
from hires.events import Event, OnEvent
from hires.options.fields import flags_of, with_flags
from hires.units import gib

if TYPE_CHECKING:
    from hires.engine.results import RenderResult
    from hires.planning.plan import MemoryPlan


def fail(error: HiresError, options: Sequence[type] = ()) -> NoReturn:
    """One message on stderr that names options by their flags, the error's exit code, no traceback."""
    print(f"error: {in_flags(str(error), options)}", file=sys.stderr)
    raise typer.Exit(error.exit_code)


UNDECLARED = {name: f"--{name}" for name in ("base", "family", "grid", "init", "parts", "strength", "vae")} | {
    "few_step": "--few-step",
    "journal=None": "--no-journal",
    "waiting": "--queue",
}
"""Flags that no dataclass declares, of `hires measure` and `inspect`, and those of other commands that errors send on to."""


def in_flags(text: str, options: Sequence[type] = (), report: bool = False) -> str:
    """A text of the library with the flags of the command at work, and of these declarations, for its options.

    report: whether the text begins with something else than an option, such as a file's name.
    """
    return with_flags(text, UNDECLARED | flags_of(*options), leading=not report)


LOST = "nothing was written"
KEPT = "nothing was written, the same command goes on from here (see hires jobs)"


Result = TypeVar("Result")


def guarded(work: Callable[[], Result], stopped: str = LOST, options: Sequence[type] = ()) -> Result:
    """Run; errors raised on purpose, Ctrl-C and SIGTERM end the program without a traceback, saying what is `stopped`.

    options: the declarations of the command's options, whose flags its messages name.
    """
    try:
        with _terminable():
            return work()
    except HiresError as error:
        fail(error, options)
    except KeyboardInterrupt as error:
        print(f"stopped; {stopped}", file=sys.stderr)
        raise typer.Exit(128 + (signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT)) from None


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as `docker stop` and systemd send it."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as a KeyboardInterrupt, so that what Ctrl-C tidies up is tidied up; only the main thread can take signals."""

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class progress_display:
    """A live line on stderr for the whole run: its bar, time left, stage, step, tile, memory.

    Where stderr is no terminal, a plain line after each stage.
    """

    def __init__(self, shown: bool, preview: Path | None = None) -> None:
        self.shown, self.preview = shown, preview
        self._bar: Any = None
        self._task: Any = None
        self._stage, self._begun, self._fraction = "", 0.0, 0.0

    def __enter__(self) -> OnEvent | None:
        if not self.shown:
            return None if self.preview is None else self._draw
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self._on_event

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _draw(self, event: Event) -> None:
        from hires.images.whole import save_png

        if self.preview is not None and event.preview is not None:
            step = f"{event.stage}, step {event.step} of {event.steps}"
            save_png(self.preview, event.preview, {"Software": f"hires {__version__}", "Comment": step}, overwrite=True)

    def _on_event(self, event: Event) -> None:
        from hires.devices.memory import peak_bytes_so_far

        self._draw(event)
        if event.stage != self._stage:
            self._stage, self._begun = event.stage, time.monotonic()
        peak = gib(peak_bytes_so_far())
        if self._bar is None:
            if event.done == event.total and event.step == event.steps and event.total > 0:
                print(stage_line(event, time.monotonic() - self._begun, peak), file=sys.stderr)
            return
        if self._task is None or event.fraction < self._fraction:  # the next picture of several
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("", total=1.0)
        self._fraction = event.fraction
        self._bar.update(self._task, completed=event.fraction, description=f"{left_of(event)}{work_of(event)}, peak {peak}")


def work_of(event: Event) -> str:
    """The stage of an event, and how far it has come."""
    tiles = f"{event.done}/{event.total}"
    return f"{event.stage}: step {event.step}/{event.steps}, tile {tiles}" if event.steps else f"{event.stage}: {tiles}"


def left_of(event: Event) -> str:
    """The time left, followed by a comma; nothing before it is known."""
    return "" if event.eta_seconds is None else f"{duration(event.eta_seconds)} left, "


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3:05, 1:02:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def stage_line(event: Event, seconds: float, peak: str) -> str:
    """A finished stage as one line, and how far the whole run is then."""
    whole = f", {100 * event.fraction:.0f} % of the whole" if event.fraction < 1 else ""
    left = "" if event.eta_seconds is None or event.fraction >= 1 else f", {duration(event.eta_seconds)} left"
    return f"{work_of(event)}, peak {peak}, {seconds:.1f} s{whole}{left}"


def numbered(on_event: OnEvent | None, number: int, total: int) -> OnEvent | None:
    """A listener to one picture of several, which is told of all of them."""
    if on_event is None:
        return None
    tell = on_event
    return lambda event: tell(among(event, number, total))


def among(event: Event, number: int, total: int) -> Event:
    """An event of one picture as one of all: the picture's number before the stage, the fraction and the time left of all.

    The pictures to come are taken to need as long as this one.
    """
    fraction, left = (number - 1 + event.fraction) / total, event.eta_seconds
    if left is not None:
        left = left + (total - number) * left / (1 - event.fraction) if event.fraction < 1 else None
    return replace(event, stage=f"{number}/{total} {event.stage}", fraction=fraction, eta_seconds=left)


Report = Callable[["MemoryPlan"], str]
"""What a listener tells of a render, by its plan, when it is done."""
Watching = tuple[OnEvent | None, list[Report]]


@contextmanager
def watched(quiet: bool, preview: Path | None, profile: Path | None, timeline: Path | None) -> Iterator[Watching]:
    """The display of a render and what else listens to its events: on_event, and what reports when it is done."""
    if profile is not None and timeline is not None:
        raise RequestError("--profile and --memory-timeline: each falsifies the other; give one at a time")
    with progress_display(shown=not quiet, preview=preview_file(preview)) as shown, ExitStack() as stack:
        on_event: OnEvent | None = shown
        after: list[Report] = []
        if profile is not None:
            os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}  # before torch: its profiler is chatty
            from hires.bench.profile import Profile

            traced = stack.enter_context(Profile(profile, on_event))
            on_event, after = traced.hear, [traced.report]
        if timeline is not None:
            from hires.bench.memory_timeline import MemoryTimeline

            drawn = stack.enter_context(MemoryTimeline(timeline, on_event))
            on_event, after = drawn.hear, [drawn.draw, *after]
        yield on_event, after


def preview_file(path: Path | None) -> Path | None:
    """The file for previews, if it can be written."""
    from hires.images.whole import check_png

    if path is None:
        return None
    return check_png(path, overwrite=True)


def say(result: RenderResult, as_json: bool, quiet: bool) -> None:
    """What a finished render prints on stdout."""
    if as_json:
        print(json.dumps(result.to_json(), default=str))
    elif not quiet:
        print(summary(result))


def summary(result: RenderResult) -> str:
    """A finished render in one line."""
    return f"{result.path}: {result.size}, {result.seconds:.1f} s, peak memory {gib(result.peak_rss_bytes)}"
