"""The one road from a request to a file: plan, load, run, decode, write. What the command line and Python call."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires import __version__, planner
from hires.errors import RequestError
from hires.resolution import check_size, parse_size
from hires.specs import ModelSpec, load_spec
from hires.tiling.geometry import Size
from hires.types import DeviceSpec, Event, MemoryPlan, OnEvent, RenderRequest, RenderResult, StageStats, parse_bytes

if TYPE_CHECKING:
    import torch

    from hires.imageio import PictureSink
    from hires.pipelines.base import Family

log = logging.getLogger(__name__)


def render(
    prompt: str,
    *,
    size: str | tuple[int, int] | Size,
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "auto",
    vram: str | int | None = None,
    on_event: OnEvent | None = None,
    **options: Any,
) -> RenderResult:
    """Render a prompt at exactly `size` and return the result; with `output` also write a PNG that holds prompt and plan.

    Args:
        prompt: what to draw.
        size: "4096x4096" (WIDTHxHEIGHT), a (width, height) pair, or a Size(height, width), in pixels.
        output: a path ending in .png; None keeps the picture in memory only. It appears whole or not at all.
        overwrite: replace a file that exists.
        device: "auto", "cpu" or "cuda:0".
        vram: memory budget such as "12GiB" (2^30) or "24GB" (10^9), or bytes; default: what is free.
        on_event: called with an Event after every tile batch; raising hires.errors.Cancelled in it stops the render.
        options: fields of RenderRequest: negative, model, seed, steps, guidance, sampler, strategy, dtype, tile_px,
            overlap_px.

    Returns:
        A RenderResult; its `pixels` are (height, width, 3) uint8.

    Raises:
        RequestError: a value that cannot be carried out; nothing was rendered.
        RunError: memory or disk ran out on the way; no file was written.
        Cancelled: raised by `on_event`.
    """
    from hires.device import choose_device, probe
    from hires.imageio import check_output

    request = _request(prompt, size, options)
    path = None if output is None else check_output(Path(output).expanduser(), overwrite)
    chosen = choose_device(device)
    spec = load_spec(request.model)
    made = planner.plan(request, spec, probe(chosen, _budget(vram)))
    return run_plan(request, made, spec, chosen, path, overwrite, on_event)


def plan(
    prompt: str = "",
    *,
    size: str | tuple[int, int] | Size,
    device: str = "auto",
    vram: str | int | None = None,
    **options: Any,
) -> MemoryPlan:
    """The plan that `render` would carry out, without loading weights or torch where the device needs no probing.

    A `vram` without a CUDA device here plans for a card of that size that is elsewhere, unless device="cpu".
    """
    request = _request(prompt, size, options)
    return planner.plan(request, load_spec(request.model), describe_device(device, _budget(vram)))


def describe_device(device: str, budget_bytes: int | None) -> DeviceSpec:
    """The device to plan for. torch is imported only to look at a card that is here."""
    if device == "cpu":
        return planner.host_device(budget_bytes)
    card_here = any(Path("/dev").glob("nvidia[0-9]*")) or device != "auto"
    if card_here:
        from hires.device import choose_device, probe

        return probe(choose_device(device), budget_bytes)
    return planner.host_device() if budget_bytes is None else planner.described_card(budget_bytes)


def _budget(vram: str | int | None) -> int | None:
    if vram is None:
        return None
    return parse_bytes(vram) if isinstance(vram, str) else parse_bytes(str(vram))


def _request(prompt: str, size: str | tuple[int, int] | Size, options: Mapping[str, Any]) -> RenderRequest:
    if isinstance(size, str):
        wanted = parse_size(size)
    elif isinstance(size, Size):
        wanted = check_size(size)
    else:
        wanted = check_size(Size(int(size[1]), int(size[0])))
    unknown = options.keys() - set(RenderRequest.__dataclass_fields__)
    if unknown:
        raise RequestError(f"unknown option {sorted(unknown)[0]!r}; known: {', '.join(RenderRequest.__dataclass_fields__)}")
    return RenderRequest(prompt=prompt, size=wanted, **options)


def run_plan(
    request: RenderRequest,
    made: MemoryPlan,
    spec: ModelSpec,
    device: torch.device,
    path: Path | None,
    overwrite: bool,
    on_event: OnEvent | None,
) -> RenderResult:
    """Carry out a plan: load the model, denoise, decode into bands, write the file."""
    from hires.device import peak_resident_bytes
    from hires.imageio import PictureSink, save_png
    from hires.pipelines import progressive
    from hires.pipelines.cosxl import CosXL

    tell: OnEvent = on_event or (lambda event: None)
    begun = time.monotonic()
    tell(Event(stage="load", done=0, total=1))
    family = CosXL(spec, request.prompt, request.negative, device=device, dtype=made.dtype, vae_dtype=made.decode.dtype)
    tell(Event(stage="load", done=1, total=1))
    denoised = progressive.run(family, made, request.seed, tell)
    sink = PictureSink(request.size)
    decoding = _decode(family, denoised.latents, made, sink, tell)
    if path is not None:
        tell(Event(stage="write", done=0, total=1))
        save_png(path, sink.finished(), metadata(request, made), overwrite)
        tell(Event(stage="write", done=1, total=1))
    return RenderResult(
        path=path,
        size=request.size,
        seed=request.seed,
        plan=made,
        stats=(*denoised.stats, decoding),
        seconds=time.monotonic() - begun,
        peak_rss_bytes=peak_resident_bytes(),
        pixels=sink.finished(),
    )


def _decode(family: Family, latents: torch.Tensor, made: MemoryPlan, sink: PictureSink, tell: OnEvent) -> StageStats:
    """Decode into the sink; after an out-of-memory the ladder's next decode plan starts the decoding over."""
    import torch

    from hires.device import peak_device_bytes, reset_peak
    from hires.tiling.retry import first_that_fits
    from hires.tiling.vae import decode_bands
    from hires.types import DecodePlan

    begun = time.monotonic()
    reset_peak(family.device)
    tiles = 0

    def on_tile(done: int, total: int) -> None:
        nonlocal tiles
        tiles = total
        tell(Event(stage="decode", done=done, total=total))

    def attempt(decode: DecodePlan) -> bool:
        sink.restart()
        with torch.inference_mode():
            for band in decode_bands(family.decode, latents, decode, family.spec.cell_px, on_tile):
                sink.write(band[0].permute(1, 2, 0).numpy())
        return True

    rungs = [made.decode, *(rung.decode for rung in made.ladder if rung.stage == "decode")]
    _, taken = first_that_fits(attempt, rungs, lambda rung: f"decode tiles of {rung.tile_cells} cells")
    seconds = round(time.monotonic() - begun, 3)
    peak = peak_device_bytes(family.device)
    return StageStats(stage="decode", seconds=seconds, peak_bytes=peak, tiles=tiles, retries=taken)


def metadata(request: RenderRequest, made: MemoryPlan) -> dict[str, str]:
    """The PNG's text chunks: prompt, seed, sampler and the whole plan."""
    return {
        "Software": f"hires {__version__}",
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": str(request.seed),
        "sampler": made.stages[0].sampler,
        "model": made.model,
        "hires:plan": json.dumps(made.to_json(), default=str, sort_keys=True),
    }
