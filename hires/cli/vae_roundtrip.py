"""`hires vae-roundtrip`: encode an image and decode it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hires.cli.display import guarded, progress_display
from hires.cli.options import AsJson, Device, Overwrite, Quiet, Vram, whole
from hires.tiling.bands.storage import VAE_POLICIES
from hires.units import gib


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
                source,
                output,
                vae=vae,
                vram=vram,
                policy=policy,
                band_px=band,
                attention_policy=attention_policy,
                attention_window=attention_window,
                overwrite=overwrite,
                device=device,
                on_event=on_event,
            )

    result = guarded(work)
    if as_json:
        print(json.dumps(result.to_json()))
    elif not quiet:
        print(
            f"{result.path}: {result.size}, {result.psnr_db} dB, {result.seconds:.1f} s, encoded with {result.encode}, "
            f"decoded with {result.decode}, peak memory {gib(result.peak_rss_bytes)}"
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("vae-roundtrip")(vae_roundtrip)
