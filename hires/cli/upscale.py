"""`hires upscale`: one picture, a folder or a pattern; registered by `cli`."""

from __future__ import annotations

import glob
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hires.cli.display import guarded, progress_display
from hires.cli.options import number, whole
from hires.errors import HiresError, RequestError
from hires.events import Event, OnEvent
from hires.options.render import PRESETS
from hires.units import gib

if TYPE_CHECKING:
    from hires.options.upscale import UpscaleRequest


READ = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".heic", ".heif", ".avif", ".bmp", ".ppm", ".pgm")
ANY = "lanczos, demo (Lanczos refined by the shipped model), or a file of a network that spandrel knows."


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def upscale(
        pictures: Annotated[
            list[str], typer.Argument(metavar="IN...", help="Pictures, folders or quoted patterns.", show_default=False)
        ],
        output: Annotated[
            Path, typer.Option("-o", "--output", metavar="OUT", help="The file to write, or a folder for several.")
        ],
        scale: Annotated[
            float | None, typer.Option(parser=number, metavar="X", help="Factor of both sides; default: the network's, or 4.")
        ] = None,
        size: Annotated[str | None, typer.Option(metavar="WxH", help="Exact width and height instead of --scale.")] = None,
        upscaler: Annotated[str, typer.Option(metavar="NAME|FILE", help=ANY)] = "lanczos",
        refine: Annotated[bool, typer.Option("--refine", help="Draw over it with the diffusion --model.")] = False,
        strength: Annotated[
            float | None, typer.Option(parser=number, metavar="X", help="How much is drawn anew; default 0.35.")
        ] = None,
        prompt: Annotated[str, typer.Option(help="What it shows, for --refine.")] = "",
        negative: Annotated[str, typer.Option(help="What to keep out, for --refine.")] = "",
        model: Annotated[str, typer.Option(help="For --refine: as of hires render.")] = "demo",
        seed: Annotated[int, typer.Option(parser=whole, metavar="N", help="For --refine.")] = 0,
        steps: Annotated[int | None, typer.Option(parser=whole, metavar="N", help="For --refine.")] = None,
        guidance: Annotated[float | None, typer.Option(parser=number, metavar="X", help="For --refine.")] = None,
        preset: Annotated[str, typer.Option(help=f"For --refine: {', '.join(PRESETS)}.")] = "balanced",
        family: Annotated[str | None, typer.Option(metavar="NAME", help="For --refine: as of hires render.")] = None,
        parts: Annotated[str | None, typer.Option(metavar="FOLDER", help="For --refine: as of hires render.")] = None,
        lora: Annotated[
            list[str] | None, typer.Option("--lora", metavar="PATH[:SCALE]", help="For --refine; may be given several times.")
        ] = None,
        colour_fix: Annotated[str, typer.Option("--colour-fix", help="For --refine: wavelet, adain or none.")] = "wavelet",
        bits: Annotated[int | None, typer.Option(parser=whole, metavar="N", help="8 or 16; default: the picture's.")] = None,
        suffix: Annotated[
            str | None, typer.Option("--suffix", metavar=".EXT", help="Format of the files in a folder; default: their own.")
        ] = None,
        tile: Annotated[
            int | None,
            typer.Option("--tile", parser=whole, metavar="PX", help="Side of a network's tiles; default: what fits."),
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu or cuda:0.")] = "auto",
        dtype: Annotated[str, typer.Option(help="Of the network: auto, fp32, fp16, bf16.")] = "auto",
        vram: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory budget, such as 8GB.")] = None,
        ram: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the whole process, for --refine.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
        quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    ) -> None:
        """Enlarge pictures to an exact size: by Lanczos or a network, then drawn over by a diffusion model with --refine.

        Several pictures go into the folder OUT under their own names; those that cannot be read are told and skipped, and the
        exit code is 1. Profiles, transparency and 16 bits are kept.
        """

        def work() -> Report:
            from hires.options import upscale as upscale_options
            from hires.options.sizes import parse_size

            drawn = upscale_options.Refinement(
                strength=upscale_options.REFINE_STRENGTH if strength is None else strength, prompt=prompt, negative=negative,
                model=model, seed=seed, steps=steps, guidance=guidance, preset=preset, family=family, parts=parts,
                loras=lora or (), colour_fix=None if colour_fix == "none" else colour_fix,
            )  # fmt: skip
            refined = refine or upscaler == "demo"
            if strength is not None and not refined:
                raise RequestError(f"--strength {strength:g}: is of a refinement; add --refine")
            options = upscale_options.UpscaleRequest(
                scale=scale, size=None if size is None else parse_size(size), bits=bits, tile_px=tile, device=device,
                upscaler="lanczos" if upscaler == "demo" else upscaler, refinement=drawn if refined else None,
                dtype=dtype, vram=vram, ram=ram,
            )  # fmt: skip
            with progress_display(shown=not quiet) as on_event:
                return carried_out(pictures, output, options, suffix, overwrite, on_event)

        report: Report = guarded(work, "the picture in progress was not written")
        report.say(as_json, quiet)
        if report.failed:
            raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Report:
    """What a run of the command gives: results, and files that were skipped with their errors; one: not a batch."""

    done: list[Any]
    failed: list[tuple[Path, HiresError]]
    one: bool

    def say(self, as_json: bool, quiet: bool) -> None:
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


def carried_out(
    names: list[str], output: Path, options: UpscaleRequest, suffix: str | None, overwrite: bool, on_event: OnEvent | None
) -> Report:
    """Enlarge what was named: one file into `output`, several into the folder that it is. RequestError as of `upscale`."""
    from hires.engine.upscale import Batch, upscale_files
    from hires.images.formats import check_output

    files, several = found_files(names)
    if not several and not output.is_dir():
        if suffix is not None:
            raise RequestError(f"--suffix {suffix}: is of files in a folder; give the name's own ending with -o")
        path = check_output(output.expanduser(), overwrite)
        return Report([Batch(options).run(files[0], path, overwrite, on_event)], [], one=True)
    if not output.is_dir():
        if output.suffix or output.exists():
            raise RequestError(f"-o {output}: {len(files)} pictures go into a folder; give the name of one")
        output.mkdir()
    said = _counted(on_event)
    outcomes = list(upscale_files(files, output, options, suffix=suffix, overwrite=overwrite, on_event=said))
    done = [outcome.result for outcome in outcomes if outcome.result is not None]
    return Report(done, [(outcome.file, outcome.error) for outcome in outcomes if outcome.error is not None], one=False)


def found_files(names: list[str]) -> tuple[list[Path], bool]:
    """The pictures that are meant, in order, and whether several may be: a folder's, a pattern's, or more than one name.

    RequestError where there is none.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READ)
        elif not path.exists() and glob.has_magic(name):
            matched = glob.iglob(name, recursive=True)  # noqa: PTH207  a pattern may begin anywhere
            found += sorted(file for file in map(Path, matched) if file.is_file())
        else:
            found.append(path)
    files = list(dict.fromkeys(found))
    if not files:
        raise RequestError(
            f"IN {' '.join(names)[:200]}: no picture there; give a file, a folder of pictures or a quoted pattern"
        )
    return files, len(names) > 1 or files != [Path(names[0]).expanduser()]


def _counted(on_event: OnEvent | None) -> OnEvent | None:
    """The display of a batch: each stage of a picture is named with the picture's number among all."""
    if on_event is None:
        return None
    place = ""

    def tell(event: Event) -> None:
        nonlocal place
        if event.stage == "files":
            place = f"{min(event.done + 1, event.total)}/{event.total}"
            return
        named = Event(
            stage=f"{place} {event.stage}", done=event.done, total=event.total, step=event.step, steps=event.steps,
            preview=event.preview,
        )  # fmt: skip
        on_event(named)

    return tell
