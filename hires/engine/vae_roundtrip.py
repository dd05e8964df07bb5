"""Encodes a picture with an autoencoder and decodes it again.

It shows what the autoencoder keeps, and what a storage policy costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hires.checkpoints.detect_folder import read_json
from hires.checkpoints.locate import NAMED_MODELS
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError
from hires.events import Event, OnEvent
from hires.kernels.attention_policies import Policy, make_policy
from hires.options.declarations import MachineOptions, OutputOptions
from hires.options.fields import Option, Options, declared
from hires.options.stage import parse_policy
from hires.tiling.bands.storage import VAE_POLICIES, BandStorage
from hires.tiling.geometry import Size, round_up
from hires.units import Json, parse_bytes

if TYPE_CHECKING:
    import torch

    from hires.tiling.halo import HaloVAE
    from hires.tiling.vae import TiledVAE

MACHINE = declared(MachineOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """A finished round trip."""

    path: Path
    """Where the picture is."""
    size: Size
    encode: BandStorage
    """How it was encoded."""
    decode: BandStorage
    """How it was decoded."""
    psnr_db: float
    """Peak signal-to-noise ratio against the input."""
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> Json:
        """The values as JSON, as `--json` prints them."""
        document: Json = asdict(self) | {"path": str(self.path), "size": str(self.size)}
        document["encode"]["attention"], document["decode"]["attention"] = (
            str(self.encode.attention),
            str(self.decode.attention),
        )
        return document


def vae_folder(name: str) -> Path:
    """The autoencoder's own folder: that of a named model, of a model folder, or the one given."""
    path = load_spec(name).path if name in NAMED_MODELS else Path(name)
    for folder in (path / "vae", path):
        config = folder / "config.json"
        if config.is_file() and str(read_json(config).get("_class_name", "")).startswith("Autoencoder"):
            return folder
    raise ModelError(f"vae {name}: no folder with an autoencoder's config.json; give demo or a diffusers folder")


MID_BLOCK_CELLS = 128  # the side of the largest pictures that SDXL's autoencoder is known to do well on: 1024 px
CELL_PX = 8


def mid_block_policy(text: str | None) -> Policy:
    """An autoencoder's `attention_policy` in latent cells of 8 px; windows are 1024 px wide unless the text says."""
    choice = parse_policy(text)
    if choice.shift or choice.name == "proportional":
        raise RequestError(f"attention_policy {text}: an autoencoder takes npa, windows or kvpool, and nothing that moves")
    cells = choice.value if choice.name == "kvpool" or choice.value is None else choice.value // CELL_PX
    try:
        return make_policy(choice.name, MID_BLOCK_CELLS, cells)
    except ValueError as error:
        raise RequestError(f"attention_policy {text}: {error}; give a window of {4 * CELL_PX} px or more") from None


@dataclass(frozen=True, kw_only=True)
class RoundTripOptions(Options):
    """The options of `vae_roundtrip`."""

    vae: Annotated[
        str, Option(help="demo, or a diffusers folder of a model or of an autoencoder.", group="model", panel="Model")
    ] = "demo"
    vram: Annotated[str | int | None, MACHINE["vram"].option] = None
    policy: Annotated[
        str | None,
        Option(help=f"One of {', '.join(VAE_POLICIES)}; default: the fastest that fits.", group="machine", panel="Memory"),
    ] = None
    band_px: Annotated[
        int | None,
        Option(help="Rows of a feature map at a time.", metavar="PX", group="machine", panel="Memory"),
    ] = None
    attention_policy: Annotated[
        str | None,
        Option(
            help="Approximation of its attention: npa, windows or kvpool; npa:1024 is in px.",
            metavar="NAME[:N]",
            panel="Quality",
        ),
    ] = None
    attention_window: Annotated[
        int | None,
        Option(help="Approximation: each row of latents attends to so many rows only.", metavar="ROWS", panel="Quality"),
    ] = None
    device: Annotated[str, MACHINE["device"].option] = "auto"
    overwrite: Annotated[bool, declared(OutputOptions)["overwrite"].option] = False


DEFAULT_OPTIONS = RoundTripOptions()


def vae_roundtrip(
    source: str | Path,
    output: str | Path,
    options: RoundTripOptions = DEFAULT_OPTIONS,
    *,
    on_event: OnEvent | None = None,
) -> RoundTrip:
    """Encode and decode a picture file band by band and write the result, at the input's exact size.

    Args:
        source: a picture that Pillow reads.
        output: a path as in `render`.
        options: the autoencoder, and how it runs.
        on_event: called with an Event after every band; may raise to cancel.

    Raises:
        RequestError: a value or file that cannot be used; RunError: memory or disk ran out. No file is left behind.
    """
    import torch

    from hires.devices.memory import freed_pages, peak_resident_bytes
    from hires.devices.probe import choose_device
    from hires.images.formats import check_fits, check_output
    from hires.images.sinks import ArraySink, ImageSink
    from hires.images.whole import read_picture
    from hires.kernels.blend import to_integers
    from hires.metrics.fidelity import psnr
    from hires.pipelines.clock import clocked
    from hires.tiling.resize import Padded

    begun = time.monotonic()
    path = check_output(Path(output), options.overwrite)
    pixels = read_picture(source)
    size = Size(*pixels.shape[:2])
    check_fits(path, size)
    device = choose_device(options.device)
    tiled = _autoencoder(options, device)
    canvas = Size(*(round_up(side, tiled.cell_px) for side in (size.height, size.width)))
    cells, sink = canvas.divided(tiled.cell_px), ArraySink(size)
    hear = clocked(on_event, str(device), ("encode", "decode"))
    with freed_pages("kept" if device.type == "cpu" and options.vram is None else "usual"), torch.inference_mode():
        latents = tiled.encode(Padded(pixels, canvas), _progress(hear, "encode"))
        encoded = _finished_way(tiled, cells, encode=True)
        for band in tiled.decode_bands(latents, _progress(hear, "decode")):
            sink.put(to_integers(band[0]).cpu().numpy())
    decoded = _finished_way(tiled, cells)
    sink.close()
    text = {"Software": "hires vae-roundtrip", "vae": options.vae}
    with ImageSink.open(path, size, metadata=text, overwrite=options.overwrite) as file:
        file.write(sink.pixels)
    return RoundTrip(
        path=path,
        size=size,
        encode=encoded,
        decode=decoded,
        psnr_db=round(psnr(sink.pixels, pixels, 255.0), 2),
        seconds=round(time.monotonic() - begun, 3),
        peak_rss_bytes=peak_resident_bytes(),
    )


def _autoencoder(options: RoundTripOptions, device: torch.device) -> TiledVAE | HaloVAE:
    """The autoencoder on its device, in float32, with a budget or a policy."""
    import torch

    from hires.devices.probe import probe
    from hires.models.loading import load_autoencoder
    from hires.tiling.halo import tiled_autoencoder

    vram, policy = options.vram, options.policy
    if vram is not None and policy is not None:
        raise RequestError(f"vram {vram} and `policy` {policy}: a budget chooses the policy; give one of the two")
    module = load_autoencoder(vae_folder(options.vae), torch.float32, device)
    budget = parse_bytes(vram) if isinstance(vram, str) else vram
    if policy is None:
        budget = probe(device, budget).budget_bytes  # what is free where none is given
        if device.type == "cuda":  # a budget on a card holds the weights as well
            budget -= sum(p.numel() * p.element_size() for p in module.parameters())
    return tiled_autoencoder(
        module,
        budget_bytes=budget,
        policy=policy,
        band_px=options.band_px,
        attention=mid_block_policy(options.attention_policy),
        attention_window=options.attention_window,
    )


def _finished_way(tiled: TiledVAE | HaloVAE, cells: Size, *, encode: bool = False) -> BandStorage:
    """The way in which the last call finished, after those that ran out of memory."""
    return tiled.plan(cells.height, cells.width, encode=encode)[tiled.last.taken if tiled.last else 0]


def _progress(hear: OnEvent, stage: str) -> Callable[[int, int], None]:
    """Bands done and in all as events of a stage."""

    def report(done: int, total: int) -> None:
        hear(Event(stage=stage, done=done, total=total))

    return report
