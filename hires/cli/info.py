"""`hires inspect`, `measure`, `vae-roundtrip`, `jobs`, `info`: what is no render; registered by `cli`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hires._version import __version__
from hires.cli.display import guarded, progress_display
from hires.cli.options import AsJson, Device, Family, Overwrite, Parts, Quiet, Vram, whole
from hires.tiling.bands.storage import VAE_POLICIES
from hires.units import gib


def register(app: typer.Typer) -> None:
    """Add the commands."""

    @app.command()
    def inspect(
        name: Annotated[
            str, typer.Argument(metavar="MODEL", help="A file, a folder, or org/name on the hub.", show_default=False)
        ],
        family: Family = None,
        parts: Parts = None,
        as_json: AsJson = False,
    ) -> None:
        """Print what a checkpoint, LoRA or autoencoder is and why, what it holds, what it lacks, and how to run it."""
        from hires.checkpoints import inspect as report

        document = guarded(lambda: report.inspect(name, family=family, parts=parts))
        print(json.dumps(document) if as_json else "\n".join(report.lines(document)))

    @app.command()
    def measure(
        file: Annotated[Path, typer.Argument(metavar="FILE", help="The picture to measure.", show_default=False)],
        base: Annotated[
            Path | None, typer.Option("--base", metavar="FILE", help="The small picture that it was drawn from.")
        ] = None,
        grid: Annotated[
            str | None,
            typer.Option(
                "--grid", metavar="TILE:OVERLAP", help="Its tiles in px, such as 1024:256; default: the plan in the PNG."
            ),
        ] = None,
        report_file: Annotated[
            Path | None, typer.Option("--report", metavar="FILE.png", help="Draw the measures into a PNG; overwritten.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Measure a picture: contrast, detail beyond its base, seams against random grids, drift, duplicates."""
        from hires.metrics import measure_file

        def work() -> Any:
            from hires.errors import OutputError
            from hires.images.whole import check_png, save_png

            target = None if report_file is None else check_png(report_file, overwrite=True)
            if target is not None and target.resolve() in (file.resolve(), file if base is None else base.resolve()):
                raise OutputError(f"--report {target}: is a picture to be measured; give another name")
            found, source = measure_file.measure_file(file, base, grid)
            if target is not None:
                from hires.metrics.report_picture import report as drawn

                save_png(target, drawn(file.name, source, found), {"Software": f"hires {__version__}"}, overwrite=True)
            return found

        found = guarded(work)
        print(json.dumps(found.to_json()) if as_json else "\n".join(measure_file.lines(str(file), found)))

    @app.command("vae-roundtrip")
    def vae_roundtrip(
        source: Annotated[Path, typer.Argument(metavar="IN", help="A picture file of any size.", show_default=False)],
        output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
        vae: Annotated[str, typer.Option(help="demo, or a diffusers folder of a model or of an autoencoder.")] = "demo",
        vram: Vram = None,
        policy: Annotated[
            str | None, typer.Option(help=f"One of {', '.join(VAE_POLICIES)}; default: the fastest that fits.")
        ] = None,
        band: Annotated[int | None, typer.Option(parser=whole, metavar="PX", help="Rows of a feature map at a time.")] = None,
        attention_policy: Annotated[
            str | None,
            typer.Option(metavar="NAME[:N]", help="Approximation of its attention: npa, windows or kvpool; npa:1024 is in px."),
        ] = None,
        attention_window: Annotated[
            int | None,
            typer.Option(parser=whole, metavar="ROWS", help="Approximation: each row of latents attends to so many rows only."),
        ] = None,
        device: Device = "auto",
        as_json: AsJson = False,
        quiet: Quiet = False,
        overwrite: Overwrite = False,
    ) -> None:
        """Encode a picture with an autoencoder and decode it again, exactly, in the memory given."""
        from hires.engine import vae_roundtrip as roundtrip

        def work() -> Any:
            with progress_display(shown=not quiet) as on_event:
                return roundtrip.vae_roundtrip(
                    source, output, vae=vae, vram=vram, policy=policy, band_px=band, attention_policy=attention_policy,
                    attention_window=attention_window,
                    overwrite=overwrite, device=device, on_event=on_event,
                )  # fmt: skip

        result = guarded(work)
        if as_json:
            print(json.dumps(result.to_json()))
        elif not quiet:
            print(f"{result.path}: {result.size}, {result.psnr_db} dB, {result.seconds:.1f} s, encoded with {result.encode}, "
                  f"decoded with {result.decode}, peak memory {gib(result.peak_rss_bytes)}")  # fmt: skip

    @app.command()
    def jobs(
        folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where the outputs are.", show_default=False)] = Path(),
        clean: Annotated[bool, typer.Option("--clean", help="Remove those that no process works on.")] = False,
        as_json: AsJson = False,
    ) -> None:
        """List unfinished renders, which the same command goes on with, or remove what is kept of them."""
        from hires.resume import unfinished

        found = guarded(lambda: unfinished.unfinished(folder))
        removed = unfinished.clean(found) if clean else []
        if as_json:
            document = {"jobs": [job.to_json() for job in found], "removed": [job.output for job in removed]}
            print(json.dumps(document))
            return
        for job in found:
            state = "removed" if job in removed else job.progress
            age = f"{job.age_seconds / 60:.0f} min ago"
            print(f"{job.output}  {job.size}  {state}  {age}  {gib(job.held_bytes)}  {job.prompt[:60]}")
        if not found:
            print(f"nothing unfinished in {folder.resolve()}")

    @app.command()
    def info(as_json: AsJson = False) -> None:
        """Show the device, the attention backends with their reasons, libraries and models."""
        facts = guarded(collect_info)
        if as_json:
            print(json.dumps(facts))
            return
        for title, rows in facts.items():
            print(title)
            for name, value in rows.items():
                print(f"  {name:<14} {value}")


def collect_info() -> dict[str, dict[str, str]]:
    """What `hires info` prints, by section."""
    import importlib
    import importlib.metadata

    import torch

    from hires._imports import quiet_imports
    from hires.checkpoints.locate import NAMED_MODELS
    from hires.checkpoints.spec import load_spec
    from hires.devices.probe import choose_device, probe
    from hires.kernels import blend, group_norm
    from hires.kernels.dispatch import AttentionSpec, table

    device = choose_device("auto")
    facts = probe(device)
    dtype = torch.bfloat16 if facts.kind == "cuda" and facts.bf16 else torch.float32
    spec = AttentionSpec(device=device.type, dtype=dtype, head_dim=64, queries=4096, keys=4096, masked=False)
    maps = group_norm.MapSpec(device=device.type, dtype=dtype)
    libraries = {"hires": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "diffusers", "transformers", "triton", "xformers", "tifffile", "pyvips", "spandrel"):
        with quiet_imports() as said:
            try:
                importlib.import_module(name)
                state = importlib.metadata.version(name)
            except Exception as error:  # any failure of an optional library is what this table is for
                state = f"not usable: {type(error).__name__}: {error}"
        libraries[name] = "; ".join([state, *(" ".join(line.split()) for line in said)])
    return {
        "device": {"name": facts.name, "budget": gib(facts.budget_bytes), "bf16": "yes" if facts.bf16 else "no"},
        "attention backends": {name: reason or "runs" for name, reason in table(spec)},
        "group norm backends": {name: reason or "runs" for name, reason in group_norm.table(maps)},
        "blend backends": {name: reason or "runs" for name, reason in blend.table(maps)},
        "libraries": libraries,
        "models": {name: _describe(load_spec(name)) for name in NAMED_MODELS},
    }


def _describe(spec: Any) -> str:
    params = (spec.network_params + spec.text_params + spec.vae_params) / 1e6
    return f"{spec.family}, {spec.native_px} px native, {spec.parameterisation}, {params:.1f} M parameters, {spec.path}"
