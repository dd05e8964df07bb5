"""`hires vae-roundtrip`: encode an image and decode it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from hires.cli.display import guarded, progress_display
from hires.cli.options import Command, Given, ReportFlags, argument, keywords
from hires.engine.vae_roundtrip import RoundTrip, RoundTripOptions, vae_roundtrip
from hires.options.fields import declared
from hires.units import gib


@dataclass(frozen=True, kw_only=True)
class RoundTripFlags(RoundTripOptions):
    """The options as the command line names them."""

    band_px: Annotated[int | None, replace(declared(RoundTripOptions)["band_px"].option, flag="--band")] = None


ROUND_TRIP = Command(
    arguments=(
        argument("source", "IN", "A picture file of any size.", kind=Path),
        argument("output", "OUT", "The file to write.", kind=Path),
    ),
    options=(RoundTripFlags, ReportFlags),
    sections=False,
)


def run(given: Given) -> None:
    """Encode a picture with an autoencoder and decode it again, exactly, in the memory given."""

    def work() -> RoundTrip:
        options = RoundTripFlags(**keywords(RoundTripFlags, given))
        with progress_display(shown=not given["quiet"]) as on_event:
            return vae_roundtrip(given["source"], given["output"], options, on_event=on_event)

    result = guarded(work, options=ROUND_TRIP.options)
    if given["as_json"]:
        print(json.dumps(result.to_json()))
    elif not given["quiet"]:
        print(
            f"{result.path}: {result.size}, {result.psnr_db} dB, {result.seconds:.1f} s, encoded with {result.encode}, "
            f"decoded with {result.decode}, peak memory {gib(result.peak_rss_bytes)}"
        )


def register(app: typer.Typer) -> None:
    """Add the command."""
    ROUND_TRIP.add(app, "vae-roundtrip", run)
