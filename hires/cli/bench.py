"""`hires bench`: what this machine does; registered by `cli`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hires.cli.display import guarded
from hires.errors import RequestError

if TYPE_CHECKING:
    from hires.bench.row import BenchSetup, Row


Device = Annotated[str, typer.Option(help="auto, cpu or cuda:0.")]
AsJson = Annotated[bool, typer.Option("--json", help="The document on stdout alone, nothing on stderr.")]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", metavar="WxH", help="Of the pictures; may be given several times; default: the suite's."),
]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16.")]
Vram = Annotated[str | None, typer.Option(metavar="SIZE", help="Memory budget, such as 24GB; default: what is free.")]
Model = Annotated[str, typer.Option(help="For vae, denoise, render, upscale: as of hires render.")]
Parts = Annotated[str | None, typer.Option(metavar="FOLDER", help="For the same: as of hires render.")]
Upscaler = Annotated[str | None, typer.Option("--upscaler", metavar="FILE", help="For upscale: a network beside Lanczos.")]
Quick = Annotated[bool, typer.Option("--quick", help="Toy sizes and few repeats: every code path in seconds.")]
Csv = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to a CSV file.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the rows into a .png or .svg (extra plot).")]
ABOUT = {
    "attention": "Attention of CosXL, PixArt and the autoencoder, by every backend: all tokens, checked in float64, and npa.",
    "norm": "GroupNorm's statistics and its apply with SiLU, on maps of the UNet and of the autoencoder.",
    "vae": "The autoencoder by every policy that fits the budget, against the module itself.",
    "denoise": "One evaluation of the guided denoiser: in tiles, and by neighbourhood attention over the canvas.",
    "render": "Whole renders by every preset: seconds, predicted and measured bytes, seam score.",
    "io": "Pictures written by rows and read back, beside Pillow.",
    "upscale": "Four times a picture: Lanczos, a network, and refined by the model.",
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    bench = typer.Typer(
        help="Measure this machine. Rows go to stderr as they come; the last line of stdout is one JSON document.",
        no_args_is_help=True,
    )
    app.add_typer(bench, name="bench")
    for name, about in [*ABOUT.items(), ("all", "Every suite in turn.")]:
        bench.command(name, help=about)(_command(name))

    @bench.command()
    def calibrate(device: Device = "auto", as_json: AsJson = False) -> None:
        """Measure once what this machine sustains, so that plans' seconds and budgets go by it; less than two minutes."""

        def work() -> Any:
            from hires.bench.calibrate import calibrate as measure
            from hires.devices import calibration
            from hires.devices.probe import choose_device

            told = partial(print, file=sys.stderr)
            found = measure(choose_device(device), (lambda line: None) if as_json else told)
            return found, calibration.save(calibration.cache_folder(), found)

        found, path = guarded(work)
        if not as_json:
            print(f"{found.device}: kept in {path}", file=sys.stderr)
        print(json.dumps(asdict(found) | {"path": str(path)}))


def _command(name: str) -> Callable[..., None]:
    def command(
        size: Sizes = None,
        device: Device = "auto",
        dtype: Dtype = "auto",
        vram: Vram = None,
        model: Model = "demo",
        parts: Parts = None,
        upscaler: Upscaler = None,
        quick: Quick = False,
        csv: Csv = None,
        plot: Plot = None,
    ) -> None:
        def work() -> dict[str, Any]:
            from hires.bench.row import SUITES, BenchSetup
            from hires.devices.probe import choose_device
            from hires.options.sizes import parse_size

            setting = BenchSetup(
                device=choose_device(device),
                dtype=dtype,
                sizes=tuple(parse_size(text) for text in size or ()),
                vram=vram,
                model=model,
                parts=parts,
                upscaler=upscaler,
                quick=quick,
            )
            return carried_out(SUITES if name == "all" else (name,), setting, csv, plot)

        print(json.dumps(guarded(work, "the rows so far are above")))

    return command


def carried_out(names: tuple[str, ...], setting: BenchSetup, csv: Path | None, plot: Path | None) -> dict[str, Any]:
    """Run suites, each row told and kept as it comes; the document of all of them. An out-of-memory is a row."""
    from hires.bench import plots
    from hires.bench.suites import described, rows_of

    setting.check()
    if plot is not None:
        plots.check_picture("--plot", plot)
    machine = described(setting)
    rows: list[Row] = []
    print(", ".join(f"{key} {value}" for key, value in machine.items()), file=sys.stderr)
    for name in names:
        for row in rows_of(name, setting):
            print(plots.line(row), file=sys.stderr, flush=True)
            rows.append(row)
            if csv is not None:
                plots.append_csv(csv, [row], machine)
    if not rows:
        raise RequestError(f"bench {names[0]}: nothing to measure at this size")
    if plot is not None:
        plots.plot(plot, rows, f"hires bench {' '.join(names)} on {machine['device']}")
    return machine | {"rows": [row.to_json() for row in rows]}
