"""`hires upscale`: one picture, a folder or a pattern; registered by `cli`."""

from __future__ import annotations

import glob
import inspect
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hires.cli.display import among, guarded, progress_display
from hires.cli.options import BatchFlags, Command, Given, ReportFlags, keywords
from hires.errors import HiresError, RequestError
from hires.events import Event, OnEvent
from hires.options.fields import chosen, declared
from hires.options.upscale import REFINEMENT, UpscaleOptions
from hires.units import gib

if TYPE_CHECKING:
    from hires.engine.results import UpscaleResult

READ = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".bmp", ".ppm", ".pgm")
OUTPUT = declared(UpscaleOptions)["output"].option
UPSCALE = Command(
    arguments=(
        inspect.Parameter(
            "pictures",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Annotated[
                list[str], typer.Argument(metavar="IN...", help="Pictures, folders or quoted patterns.", show_default=False)
            ],
        ),
    ),
    options=(UpscaleOptions, BatchFlags, ReportFlags),
    required=("output",),
    changes={"output": replace(OUTPUT, metavar="OUT", help="The file to write, or a folder for several.")},
    panels=dict.fromkeys(REFINEMENT, "With --refine"),
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    UPSCALE.add(app, "upscale", upscale)


def upscale(given: Given) -> None:
    """Enlarge pictures to an exact size: by Lanczos or a network, then drawn over by a diffusion model with --refine.

    Several pictures go into the folder OUT under their own names; those that cannot be read are told and skipped, and the
    exit code is 1. Profiles, transparency and 16 bits are kept.
    """

    def work() -> Report:
        options = chosen(UpscaleOptions, "upscale", keywords(UpscaleOptions, given))
        with progress_display(shown=not given["quiet"]) as on_event:
            return enlarge_pictures(given["pictures"], options, given["suffix"], on_event)

    report = guarded(work, "the picture in progress was not written", UPSCALE.options)
    report.say(given["as_json"], given["quiet"])
    if report.failed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run of the command gives."""

    done: list[UpscaleResult]
    """The results."""
    failed: list[tuple[Path, HiresError]]
    """Files that were skipped, with their errors."""
    one: bool
    """Whether a single file was named, not a batch."""

    def say(self, as_json: bool, quiet: bool) -> None:
        """Print the results on stdout, and the skipped files on stderr."""
        for path, error in self.failed:
            print(f"skipped {path}: {error}", file=sys.stderr)
        if as_json:
            results = [result.to_json() for result in self.done]
            skipped = [{"file": str(path), "error": str(error)} for path, error in self.failed]
            print(json.dumps(results[0] if self.one else {"done": results, "skipped": skipped}, default=str))
        elif not quiet:
            for result in self.done:
                print(f"{result.path}: {result.source} to {result.size}, {result.seconds:.1f} s")
                for note in result.notes if self.one else ():
                    print(f"  - {note}")
            peak = max((result.peak_rss_bytes for result in self.done), default=0)
            print(f"{len(self.done)} enlarged, {len(self.failed)} skipped, peak memory {gib(peak)}")


def enlarge_pictures(names: list[str], options: UpscaleOptions, suffix: str | None, on_event: OnEvent | None) -> Report:
    """Enlarge what is named: one file into `output`, several into the folder that it is. RequestError as in `upscale`."""
    from hires.engine.output import path_of
    from hires.engine.upscale import Upscaler, upscale_files, upscale_request
    from hires.images.atomic_file import make_folder
    from hires.images.formats import check_output

    output, overwrite, request = path_of(str(options.output)), options.overwrite, upscale_request(options)
    files, several = picture_files(names)
    if not several and not output.is_dir():
        if suffix is not None:
            raise RequestError(f"--suffix {suffix}: is of files in a folder; give the name's own ending with -o")
        path = check_output(output, overwrite)
        return Report([Upscaler(request).run(files[0], path, overwrite, on_event)], [], one=True)
    if not output.is_dir():
        if output.suffix or output.exists():
            raise RequestError(f"-o {output}: {len(files)} pictures go into a folder; give the name of one")
        make_folder(output)
    numbered = _counted(on_event)
    outcomes = list(upscale_files(files, output, request, suffix=suffix, overwrite=overwrite, on_event=numbered))
    done = [outcome.result for outcome in outcomes if outcome.result is not None]
    return Report(done, [(outcome.file, outcome.error) for outcome in outcomes if outcome.error is not None], one=False)


def picture_files(names: list[str]) -> tuple[list[Path], bool]:
    """The pictures that are meant, in order, and whether several may be: a folder's, a pattern's, or more than one name.

    RequestError where there is none.
    """
    matches: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            matches += sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READ)
        elif not path.exists() and glob.has_magic(name):
            matched = glob.iglob(name, recursive=True)  # noqa: PTH207  a pattern may begin anywhere
            matches += sorted(file for file in map(Path, matched) if file.is_file())
        else:
            matches.append(path)
    files = list(dict.fromkeys(matches))
    if not files:
        raise RequestError(
            f"IN {' '.join(names)[:200]}: no picture there; give a file, a folder of pictures or a quoted pattern"
        )
    return files, len(names) > 1 or files != [Path(names[0]).expanduser()]


def _counted(on_event: OnEvent | None) -> OnEvent | None:
    """The display of a batch, which is told of all its pictures."""
    if on_event is None:
        return None
    place = (1, 1)

    def tell(event: Event) -> None:
        nonlocal place
        if event.stage == "files":
            place = min(event.done + 1, event.total), event.total
        else:
            on_event(among(event, *place))

    return tell
