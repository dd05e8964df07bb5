"""The one road from a request to a file: plan, load, run, decode, write. What the command line and Python call."""

from __future__ import annotations

import json
import logging
import operator
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hires import __version__, planner
from hires.errors import MemoryLadderError, OutputError, SizeError
from hires.resolution import check_size, parse_size
from hires.specs import ModelSpec, load_spec
from hires.tiling.geometry import Size
from hires.types import (
    DecodePlan,
    DeviceSpec,
    Event,
    MemoryPlan,
    OnEvent,
    RenderRequest,
    RenderResult,
    StageStats,
    gib,
    parse_bytes,
)

if TYPE_CHECKING:
    import torch

    from hires.imageio import PictureSink
    from hires.pipelines.base import Family

log = logging.getLogger(__name__)
SizeLike = str | tuple[int, int] | Size


def render(
    prompt: str,
    *,
    size: SizeLike,
    output: str | Path | None = None,
    overwrite: bool = False,
    model: str = "demo",
    negative: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strategy: str = "auto",
    tile_px: int | None = None,
    overlap_px: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    vram: str | int | None = None,
    on_event: OnEvent | None = None,
) -> RenderResult:
    """Render a prompt at exactly `size` and return the result; with `output` also write a PNG that holds prompt and plan.

    Args:
        prompt: what to draw.
        size: "4096x4096" (WIDTHxHEIGHT), a (width, height) pair, or a Size(height, width), in pixels.
        output: a path ending in .png; None keeps the picture in memory only. It appears whole or not at all.
        overwrite: replace a file that exists.
        model: "demo", or the path of a diffusers folder.
        negative: what to keep out of the picture.
        seed: same seed, same picture.
        steps, guidance: of the base picture; None takes the model's own.
        sampler, schedule: names of ours, A1111's or ComfyUI's, such as "dpmpp_2m", "DPM++ 2M Karras"; None: the model's own.
        strategy: "auto", "direct", "tiled" or "progressive".
        tile_px, overlap_px: tile side and overlap in pixels; None takes the model's training size and a quarter.
        dtype: "auto", "fp32", "bf16" or "fp16".
        device: "auto", "cpu" or "cuda:0".
        vram: memory budget such as "12GiB" (2^30) or "24GB" (10^9), or bytes; default: what is free.
        on_event: called with an Event after every tile batch; raising hires.errors.Cancelled in it stops the render.

    Returns:
        A RenderResult; its `pixels` are (height, width, 3) uint8.

    Raises:
        RequestError: a value that cannot be carried out; nothing was rendered.
        RunError: memory or disk ran out on the way; no file was written.
        Cancelled: raised by `on_event`.
    """
    from hires.device import choose_device, probe
    from hires.imageio import check_output

    request = RenderRequest(
        prompt=prompt,
        size=_size(size),
        negative=negative,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        schedule=schedule,
        strategy=strategy,
        dtype=dtype,
        tile_px=tile_px,
        overlap_px=overlap_px,
    )
    path = None if output is None else check_output(_path(output), overwrite)
    chosen = choose_device(device)
    spec = load_spec(request.model)
    made = planner.plan(request, spec, probe(chosen, _budget(vram)))
    result = run_plan(request, made, spec, chosen, on_event or (lambda event: None))
    return result if path is None else _written(result, path, request, overwrite, on_event)


def plan(
    prompt: str = "",
    *,
    size: SizeLike,
    model: str = "demo",
    negative: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strategy: str = "auto",
    tile_px: int | None = None,
    overlap_px: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    vram: str | int | None = None,
) -> MemoryPlan:
    """What `render` would do with the same arguments, without loading weights.

    With a `vram` and device "auto" the plan is for a card of that size, here or elsewhere, and torch is not imported;
    name the device to plan for this machine with that budget. RequestError as for `render`.
    """
    request = RenderRequest(
        prompt=prompt,
        size=_size(size),
        negative=negative,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        schedule=schedule,
        strategy=strategy,
        dtype=dtype,
        tile_px=tile_px,
        overlap_px=overlap_px,
    )
    return planner.plan(request, load_spec(request.model), describe_device(device, _budget(vram)))


def describe_device(device: str, budget_bytes: int | None) -> DeviceSpec:
    """The device to plan for. torch is imported only to look at a card that is here."""
    if device == "auto" and budget_bytes is not None:
        return planner.described_card(budget_bytes)
    if device == "cpu" or (device == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))):
        return planner.host_device(budget_bytes)
    from hires.device import choose_device, probe

    return probe(choose_device(device), budget_bytes)


def _budget(vram: str | int | None) -> int | None:
    return None if vram is None else parse_bytes(str(vram))


def _path(output: str | Path) -> Path:
    try:
        return Path(output).expanduser()
    except RuntimeError as error:
        raise OutputError(f"output {output}: {error}; give a full path") from None


def _size(size: SizeLike) -> Size:
    if isinstance(size, str):
        return parse_size(size)
    if isinstance(size, Size):
        return check_size(size)
    try:
        width, height = (operator.index(side) for side in size)
    except (TypeError, ValueError):
        raise SizeError(f"size {size!r}: give 'WIDTHxHEIGHT' or a pair of whole numbers (width, height)") from None
    return check_size(Size(height, width))


def run_plan(request: RenderRequest, made: MemoryPlan, spec: ModelSpec, device: torch.device, tell: OnEvent) -> RenderResult:
    """Carry out a plan in memory: load the model, denoise, decode. MemoryLadderError where even the last rung is too large."""
    from hires.tiling.retry import is_out_of_memory

    try:
        return _run(request, made, spec, device, tell)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200]
    raise MemoryLadderError(
        f"out of memory outside the ladder ({reason}); planned peak {gib(made.peak_bytes)} of {gib(made.budget_bytes)}: "
        f"close other programs or give a smaller --size"
    )


def _run(request: RenderRequest, made: MemoryPlan, spec: ModelSpec, device: torch.device, tell: OnEvent) -> RenderResult:
    from hires.device import peak_resident_bytes
    from hires.imageio import PictureSink
    from hires.pipelines import progressive
    from hires.pipelines.cosxl import CosXL
    from hires.tiling.retry import Ladder

    begun = time.monotonic()
    tell(Event(stage="load", done=0, total=1))
    ladder = Ladder([made.decode, *(rung.decode for rung in made.ladder if rung.stage == "decode")], _describe(made))
    family = CosXL(spec, request.prompt, request.negative, device=device, dtype=made.dtype, decode=ladder)
    made = replace(made, backends=family.backends(made.latent_grid.tile))
    tell(Event(stage="load", done=1, total=1))
    denoised = progressive.run(family, made, request.seed, tell)
    sink = PictureSink(request.size)
    decoding = _decode(family, denoised.latents, sink, tell)
    if ladder.taken:
        note = f"ran out of memory: decoded {ladder.rung} instead of {made.decode}"
        made = replace(made, decode=ladder.rung, notes=(*made.notes, note))
    return RenderResult(
        path=None,
        size=request.size,
        seed=request.seed,
        plan=made,
        stats=(*denoised.stats, decoding),
        seconds=time.monotonic() - begun,
        peak_rss_bytes=peak_resident_bytes(),
        pixels=sink.finished(),
    )


def _describe(made: MemoryPlan) -> Callable[[DecodePlan], str]:
    """A rung of the decode ladder in words, with its predicted peak."""
    peaks = {rung.decode: rung.peak_bytes for rung in made.ladder if rung.stage == "decode"}
    peaks[made.decode] = next(cost.peak_bytes for cost in made.costs if cost.stage == "decode")

    def describe(decode: DecodePlan) -> str:
        return f"decode {decode}, predicted peak {gib(peaks[decode] or 0)}"

    return describe


def _decode(family: Family, latents: torch.Tensor, sink: PictureSink, tell: OnEvent) -> StageStats:
    """Decode into the sink, band by band."""
    import torch

    from hires.device import peak_device_bytes, reset_peak

    begun, retries, recomputed, tiles = time.monotonic(), family.vae.retries, family.vae.recomputed, 0
    reset_peak(family.device)

    def on_band(done: int, total: int) -> None:
        nonlocal tiles
        tiles = total
        tell(Event(stage="decode", done=done, total=total))

    with torch.inference_mode():
        for band in family.decode_bands(latents, on_band):
            sink.write(band[0].permute(1, 2, 0).numpy())
    return StageStats(
        stage="decode",
        seconds=round(time.monotonic() - begun, 3),
        peak_bytes=peak_device_bytes(family.device),
        tiles=tiles,
        retries=family.vae.retries - retries,
        recomputed=family.vae.recomputed - recomputed,
    )


def _written(
    result: RenderResult, path: Path, request: RenderRequest, overwrite: bool, on_event: OnEvent | None
) -> RenderResult:
    """The result with its file: whole, or an error and no file."""
    from hires.imageio import save_png

    tell: OnEvent = on_event or (lambda event: None)
    tell(Event(stage="write", done=0, total=1))
    save_png(path, result.pixels, metadata(request, result.plan), overwrite)
    tell(Event(stage="write", done=1, total=1))
    return replace(result, path=path)


def metadata(request: RenderRequest, made: MemoryPlan) -> dict[str, str]:
    """The PNG's text chunks: prompt, seed, sampler, schedule and the whole plan."""
    return {
        "Software": f"hires {__version__}",
        "prompt": request.prompt,
        "negative": request.negative,
        "seed": str(request.seed),
        "sampler": made.stages[0].sampler,
        "schedule": made.stages[0].schedule,
        "model": made.model,
        "hires:plan": json.dumps(made.to_json(), default=str, sort_keys=True),
    }
