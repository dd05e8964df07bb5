"""`hires bench`: what this machine does; registered by `cli`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hires.cli.display import guarded
from hires.cli.options import Command, Given, keywords
from hires.errors import RequestError
from hires.options.fields import Option, Options
from hires.units import Json

if TYPE_CHECKING:
    from hires.bench.row import BenchSetup, Row
    from hires.devices.calibration import Calibration


def option(help: str, flag: str | None = None, metavar: str | None = None) -> Option:
    """An option of a measurement."""
    return Option(help=help, flag=flag, metavar=metavar, group="run", panel="Output", local=True)


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """The options of every suite."""

    size: Annotated[
        Sequence[str],
        option("Of the pictures; may be given several times; default: the suite's.", metavar="WxH"),
    ] = ()
    device: Annotated[str, option("auto, cpu or cuda:0.")] = "auto"
    dtype: Annotated[str, option("auto, fp32, bf16, fp16.")] = "auto"
    vram: Annotated[str | None, option("Memory budget, such as 24GB; default: what is free.", metavar="SIZE")] = None
    model: Annotated[str, option("For vae, denoise, render, upscale: as of hires render.")] = "demo"
    parts: Annotated[str | None, option("For the same: as of hires render.", metavar="FOLDER")] = None
    upscaler: Annotated[str | None, option("For upscale: a network beside Lanczos.", metavar="FILE")] = None
    quick: Annotated[bool, option("Toy sizes and few repeats: every code path in seconds.")] = False
    csv: Annotated[str | None, option("Append the rows to a CSV file.", metavar="FILE")] = None
    plot: Annotated[str | None, option("Draw the rows into a .png or .svg (extra plot).", metavar="FILE")] = None

    def setup(self) -> BenchSetup:
        """What all suites share. RequestError or DeviceError for values that none could use."""
        from hires.bench.row import BenchSetup
        from hires.devices.probe import choose_device
        from hires.options.sizes import parse_size

        return BenchSetup(
            device=choose_device(self.device),
            dtype=self.dtype,
            sizes=tuple(parse_size(text) for text in self.size),
            vram=self.vram,
            model=self.model,
            parts=self.parts,
            upscaler=self.upscaler,
            quick=self.quick,
        )


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """The options of `hires bench calibrate`."""

    device: Annotated[str, option("auto, cpu or cuda:0.")] = "auto"
    as_json: Annotated[bool, option("The document on stdout alone, nothing on stderr.", flag="--json")] = False


SUITE = Command(options=(BenchOptions,), sections=False)
CALIBRATE = Command(options=(CalibrateOptions,), sections=False)
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
        SUITE.add(bench, name, partial(measure, name), help=about)
    CALIBRATE.add(bench, "calibrate", calibrate)


def calibrate(given: Given) -> None:
    """Measure once what this machine sustains, so that plans' seconds and budgets go by it; less than two minutes."""

    def work() -> tuple[Calibration, Path]:
        from hires.bench.calibrate import calibrate as measured
        from hires.devices import calibration
        from hires.devices.probe import choose_device

        tell = (lambda line: None) if given["as_json"] else partial(print, file=sys.stderr)
        result = measured(choose_device(given["device"]), tell)
        return result, calibration.save(calibration.cache_folder(), result)

    result, path = guarded(work, options=CALIBRATE.options)
    if not given["as_json"]:
        print(f"{result.device}: kept in {path}", file=sys.stderr)
    print(json.dumps(asdict(result) | {"path": str(path)}))


def measure(name: str, given: Given) -> None:
    """Run one suite, or all of them, and print the document."""

    def work() -> Json:
        from hires.bench.row import SUITES

        options = BenchOptions(**keywords(BenchOptions, given))
        csv, plot = (None if file is None else Path(file) for file in (options.csv, options.plot))
        return measured(SUITES if name == "all" else (name,), options.setup(), csv, plot)

    print(json.dumps(guarded(work, "the rows so far are above", SUITE.options)))


def measured(names: tuple[str, ...], setting: BenchSetup, csv: Path | None, plot: Path | None) -> Json:
    """Run suites, each row shown and written as it comes; the document of all of them. An out-of-memory is a row."""
    from hires.bench import plots
    from hires.bench.suites import described, rows_of

    setting.check()
    if plot is not None:
        plots.check_picture("plot", plot)
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
