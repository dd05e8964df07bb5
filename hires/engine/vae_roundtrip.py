"""`hires vae-roundtrip`: a picture through an autoencoder and back, to see what it keeps and what a policy costs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hires.checkpoints.detect_folder import read_json
from hires.checkpoints.locate import NAMED_MODELS
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError
from hires.events import OnEvent
from hires.kernels.attention_policies import Policy, make_policy
from hires.options.stage import parse_policy
from hires.tiling.bands.storage import BandStorage
from hires.tiling.geometry import Size, round_up
from hires.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTrip:
    """A finished round trip: where the picture is, the policies that ran, PSNR in dB against the input, seconds."""

    path: Path
    size: Size
    encode: BandStorage
    decode: BandStorage
    psnr_db: float
    seconds: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        document = asdict(self) | {"path": str(self.path), "size": str(self.size)}
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
    """`--attention-policy` for an autoencoder, counted in latent cells of 8 px; windows of 1024 px unless said otherwise."""
    asked = parse_policy(text)
    if asked.shift or asked.name == "proportional":
        raise RequestError(f"attention_policy {text}: an autoencoder takes npa, windows or kvpool, and nothing that moves")
    cells = asked.value if asked.name == "kvpool" or asked.value is None else asked.value // CELL_PX
    try:
        return make_policy(asked.name, MID_BLOCK_CELLS, cells)
    except ValueError as error:
        raise RequestError(f"attention_policy {text}: {error}; give a window of {4 * CELL_PX} px or more") from None


def vae_roundtrip(
    source: str | Path,
    output: str | Path,
    *,
    vae: str = "demo",
    vram: str | int | None = None,
    policy: str | None = None,
    band_px: int | None = None,
    attention_policy: str | None = None,
    attention_window: int | None = None,
    overwrite: bool = False,
    device: str = "auto",
    on_event: OnEvent | None = None,
) -> RoundTrip:
    """Encode and decode a picture file band by band and write the result, at the input's exact size.

    Args:
        source: a picture that Pillow reads; output: a path as of `render`.
        vae: "demo", a diffusers model folder, or an autoencoder's own (AutoencoderKL or AutoencoderTiny); vram: what it
            may hold, such as "8GB"; policy: one of `types.VAE_POLICIES` instead; band_px: rows of a map at a time;
            attention_policy: an approximation of the mid block, such as "npa" or "kvpool:2", see `render`;
            attention_window: another, rows of latents that each row attends to.

    Raises:
        RequestError: a value or file that cannot be used; RunError: memory or disk ran out. No file is left behind.
    """
    import torch

    from hires.devices.memory import freed_pages, peak_resident_bytes
    from hires.devices.probe import choose_device, probe
    from hires.events import Event
    from hires.images.formats import check_fits, check_output
    from hires.images.sinks import ArraySink, ImageSink
    from hires.images.whole import read_picture
    from hires.kernels.blend import to_integers
    from hires.metrics.fidelity import psnr
    from hires.models.loading import load_autoencoder
    from hires.tiling.halo import tiled_autoencoder
    from hires.tiling.resize import Padded

    begun, tell = time.monotonic(), on_event or (lambda event: None)
    path = check_output(Path(output), overwrite)
    pixels = read_picture(source)
    check_fits(path, Size(*pixels.shape[:2]))
    chosen = choose_device(device)
    if vram is not None and policy is not None:
        raise RequestError(f"vram {vram} and `policy` {policy}: a budget chooses the policy; give one of the two")
    module = load_autoencoder(vae_folder(vae), torch.float32, chosen)
    budget = parse_bytes(vram) if isinstance(vram, str) else vram
    if policy is None:
        budget = probe(chosen, budget).budget_bytes  # what is free where none is given
        if chosen.type == "cuda":  # a budget on a card holds the weights as well
            budget -= sum(p.numel() * p.element_size() for p in module.parameters())
    tiled = tiled_autoencoder(
        module,
        budget_bytes=budget,
        policy=policy,
        band_px=band_px,
        attention=mid_block_policy(attention_policy),
        attention_window=attention_window,
    )
    size = Size(*pixels.shape[:2])
    canvas = Size(*(round_up(side, tiled.cell_px) for side in (size.height, size.width)))
    picture = Padded(pixels, canvas)
    cells = canvas.divided(tiled.cell_px)

    def watch(stage: str) -> Any:
        return lambda done, total: tell(Event(stage=stage, done=done, total=total))

    with freed_pages("kept" if chosen.type == "cpu" and vram is None else "usual"), torch.inference_mode():
        latents = tiled.encode(picture, watch("encode"))
        encoded = tiled.plan(cells.height, cells.width, encode=True)[tiled.last.taken if tiled.last else 0]
        sink = ArraySink(size)
        for band in tiled.decode_bands(latents, watch("decode")):
            sink.put(to_integers(band[0]).cpu().numpy())
    decoded = tiled.plan(cells.height, cells.width)[tiled.last.taken if tiled.last else 0]
    sink.close()
    with ImageSink.open(path, size, metadata={"Software": "hires vae-roundtrip", "vae": vae}, overwrite=overwrite) as file:
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
