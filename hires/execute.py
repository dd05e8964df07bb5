"""Carrying a plan out in memory: load, denoise, decode. `engine` makes the plan and writes the file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hires.checkpoints.spec import ModelSpec
from hires.delivery import Delivery, OpenSink
from hires.devices.memory import peak_device_bytes, peak_resident_bytes, reset_peak
from hires.devices.probe import TORCH_DTYPE
from hires.errors import MemoryLadderError
from hires.events import Event, OnEvent, StageStats
from hires.images.sinks import ImageSink
from hires.images.whole import fitted, on_canvas
from hires.kernels.blend import to_integers
from hires.models.attention_processors import attention_backend
from hires.options.render import RenderRequest
from hires.pipelines import progressive
from hires.pipelines.base import Family, load_parts, load_tiny
from hires.pipelines.cosxl import CosXL
from hires.pipelines.cosxl_edit import CosXLEdit
from hires.pipelines.pixart_sigma import PixArtSigma
from hires.pipelines.progressive import Denoised
from hires.planning.plan import DecodePlan, MemoryPlan, RenderResult
from hires.refine.colour_fix import Moments, adain, wavelet_fixed
from hires.resume.journal import NO_JOURNAL, Journal
from hires.tiling.geometry import Box, Size, relay_view
from hires.tiling.resize import Enlarged, Padded
from hires.tiling.retry import Ladder, attempt, free_memory, is_out_of_memory, twice
from hires.tiling.vae import PixelSource
from hires.units import gib

log = logging.getLogger(__name__)


def run_plan(
    request: RenderRequest,
    made: MemoryPlan,
    spec: ModelSpec,
    device: torch.device,
    tell: OnEvent,
    picture: NDArray[np.uint8] | None = None,
    edges: NDArray[np.uint8] | None = None,
    journal: Journal = NO_JOURNAL,
    open_sink: OpenSink | None = None,
    mask: NDArray[np.uint8] | None = None,
) -> RenderResult:
    """Carry out a plan: load the model, denoise, decode. MemoryLadderError where even the last rung is too large.

    picture: (H, W, 3) that the plan starts from or edits; edges: (H, W, 3) that a ControlNet follows. open_sink: opens what
    takes the finished rows, which is left open; without it they are the result's pixels. mask: (H, W, 3), white where the
    picture is drawn anew; elsewhere its pixels stay as they are.
    """
    into = open_sink or Delivery(None)
    try:
        result = _run(request, made, spec, device, tell, picture, edges, journal, into, mask)
        return into.finish(result, request, tell) if open_sink is None and isinstance(into, Delivery) else result
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200]
    raise MemoryLadderError(
        f"out of memory outside the ladder ({reason}); planned peak {gib(made.peak_bytes)} of {gib(made.budget_bytes)}: "
        f"close other programs or give a smaller --size"
    )


def _run(
    request: RenderRequest,
    made: MemoryPlan,
    spec: ModelSpec,
    device: torch.device,
    tell: OnEvent,
    picture: NDArray[np.uint8] | None,
    edges: NDArray[np.uint8] | None,
    journal: Journal,
    open_sink: OpenSink,
    mask: NDArray[np.uint8] | None = None,
) -> RenderResult:
    begun = time.monotonic()
    name = attention_backend(spec, made.latent_grid.tile, device, TORCH_DTYPE[made.dtype], request.attention)
    made = replace(made, backends=(("attention", name),))
    tell(Event(stage="load", done=0, total=1))
    exact = [rung.decode for rung in made.ladder if rung.stage == "decode" and rung.exact]
    ladder = Ladder([made.decode, *exact], _describe(made))
    drawn = None if picture is None else on_canvas(picture, request.size, made.canvas)
    seen = drawn if edges is None else on_canvas(edges, request.size, made.canvas)
    family = twice(lambda: load_family(request, made, spec, device, ladder, seen, journal), "loading")
    tell(Event(stage="load", done=1, total=1))
    redrawn = None if mask is None else on_canvas(mask, request.size, made.canvas)[..., 0]
    denoised = progressive.run(family, made, request.seed, tell, drawn, journal, redrawn)
    fix = colour_fixer(family, made, denoised, drawn)
    if redrawn is not None:
        assert drawn is not None, "a mask is of a picture"
        fix = masked_fixer(drawn, redrawn, fix)
    decoding = decode(family, denoised.latents, lambda: open_sink(request.size), tell, NO_JOURNAL if fix else journal, fix)
    if family.tiny is not None and decoding.stage == "decode (tiny)":
        ladder_note = "approximation: every exact way to decode ran out of memory, the tiny autoencoder did it"
        made = replace(made, decode=replace(made.decode, policy="tiny", band_rows=0), notes=(*made.notes, ladder_note))
    elif ladder.taken:
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
    )


def load_family(
    request: RenderRequest,
    made: MemoryPlan,
    spec: ModelSpec,
    device: torch.device,
    decode: Ladder[DecodePlan],
    picture: NDArray[np.uint8] | None,
    journal: Journal = NO_JOURNAL,
) -> Family:
    """The model of a request on its device, by the pipeline of its family.

    picture: (H, W, 3) of the canvas, that an edit or a ControlNet sees.
    """
    text_device = torch.device("cpu") if made.text_on_host else device
    parts = load_parts(
        spec,
        request.prompt,
        request.negative,
        device,
        made.dtype,
        decode,
        request.loras,
        text_device,
        made.text_dtype,
        made.offload,
        journal,
    )
    if request.tiny_vae is not None:
        parts = replace(parts, tiny=load_tiny(request.tiny_vae, spec, decode.rung.dtype, device))
    if spec.facts.image_channels:
        assert picture is not None, "an edit is of a picture"
        return CosXLEdit(
            spec, parts, picture=picture, device=device, dtype=made.dtype, decode=decode, backend=request.attention,
            offload=made.offload,
        )  # fmt: skip
    if spec.facts.network == "pixart":
        return PixArtSigma(
            spec,
            parts,
            device=device,
            dtype=made.dtype,
            decode=decode,
            position_mode=request.position_mode,
            picture=picture if parts.control else None,
            backend=request.attention,
            offload=made.offload,
        )
    return CosXL(spec, parts, device=device, dtype=made.dtype, decode=decode, backend=request.attention, offload=made.offload)


def _describe(made: MemoryPlan) -> Callable[[DecodePlan], str]:
    """A rung of the decode ladder in words, with its predicted peak."""
    peaks = {rung.decode: rung.peak_bytes for rung in made.ladder if rung.stage == "decode"}
    peaks[made.decode] = next(cost.peak_bytes for cost in made.costs if cost.stage == "decode")

    def describe(decode: DecodePlan) -> str:
        return f"decode {decode}, predicted peak {gib(peaks[decode] or 0)}"

    return describe


Fixer = Callable[[Callable[[], Iterator[torch.Tensor]]], Iterator[torch.Tensor]]
"""From what decodes a picture in bands, callable more than once, to its bands with other colours."""


def colour_fixer(family: Family, made: MemoryPlan, denoised: Denoised, picture: NDArray[np.uint8] | None) -> Fixer | None:
    """The colour fix of a plan: towards the picture that was given, else towards the base picture; None without either."""
    if made.colour_fix is None or (picture is None and len(made.stages) == 1):
        return None

    def fixed(bands: Callable[[], Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        reference = Padded(fitted(picture, made.canvas), made.canvas) if picture is not None else base_picture()
        if made.colour_fix == "wavelet":
            return wavelet_fixed(bands(), reference)
        wanted = Moments.of(source_bands(reference))
        own = Moments.of(band.cpu() for band in bands())
        return (adain(band.cpu(), own, wanted) for band in bands())

    def base_picture() -> Enlarged:
        rows = [band.float().cpu() for band in family.decode_bands(denoised.first, lambda done, total: None)]
        base = torch.cat(rows, dim=-2)
        return Enlarged(base, *relay_view(Size(base.shape[-2], base.shape[-1]), made.canvas))

    return fixed


def masked_fixer(picture: NDArray[np.uint8], mask: NDArray[np.uint8], fix: Fixer | None) -> Fixer:
    """After another fix, if there is one: the picture's own pixels where its mask (H, W) is 0, blends of both between."""

    def fixed(bands: Callable[[], Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        top = 0
        for band in bands() if fix is None else fix(bands):
            bottom = top + band.shape[-2]
            rows = torch.from_numpy(np.ascontiguousarray(picture[top:bottom])).to(band.device).permute(2, 0, 1)[None]
            share = torch.from_numpy(np.ascontiguousarray(mask[top:bottom])).to(band.device).float() / 255
            known = rows.to(band.dtype) / 127.5 - 1
            yield torch.where(share > 0, known + share * (band - known), known)
            top = bottom

    return fixed


def source_bands(source: PixelSource, rows: int = 256) -> Iterator[torch.Tensor]:
    """A picture from top to bottom, (1, 3, rows, W) at a time."""
    size = source.size
    for top in range(0, size.height, rows):
        yield source.crop(Box(top, 0, min(rows, size.height - top), size.width))


def decode(
    family: Family,
    latents: torch.Tensor,
    open_sink: Callable[[], ImageSink],
    tell: OnEvent,
    journal: Journal = NO_JOURNAL,
    fix: Fixer | None = None,
) -> StageStats:
    """The picture into the sink that is opened last, which stays open; what it took.

    Where no exact way has room the small autoencoder starts over, if there is one.
    """
    if family.tiny is None:
        return _decoded(family, family.decode_bands, latents, open_sink, tell, journal, fix)
    try:
        return _decoded(family, family.decode_bands, latents, open_sink, tell, journal, fix)
    except MemoryLadderError as error:
        message = str(error)
    free_memory()
    log.warning("%s; decoding with the tiny autoencoder, an approximation", message)
    stats = _decoded(family, family.decode_tiny, latents, open_sink, tell, fix=fix)
    return replace(stats, stage="decode (tiny)")


def _decoded(
    family: Family,
    way: Callable[..., Iterator[torch.Tensor]],
    latents: torch.Tensor,
    open_sink: Callable[[], ImageSink],
    tell: OnEvent,
    journal: Journal = NO_JOURNAL,
    fix: Fixer | None = None,
) -> StageStats:
    """Decode band by band. A colour fix needs rows above the first missing one, so it has no journal of bands."""
    begun, retries, recomputed, tiles = time.monotonic(), family.vae.retries, family.vae.recomputed, 0
    reset_peak(family.device)

    def on_band(done: int, total: int) -> None:
        nonlocal tiles
        tiles = total
        tell(Event(stage="decode", done=done, total=total))

    def fill(sink: ImageSink) -> ImageSink:
        done, bits = 0, 8 * sink.dtype.itemsize
        for rows in journal.rows():
            if rows.dtype != sink.dtype:
                break  # they were of other bits
            sink.put(rows)
            done += len(rows)
        with torch.inference_mode():
            plain = partial(way, latents, on_band, *([done] if done else []))
            for band in plain() if fix is None else fix(plain):
                rows = to_integers(band[0], bits).cpu().numpy()
                journal.keep_rows(done, rows)
                sink.put(rows)
                done += len(rows)
        return sink

    sink, message = attempt(fill, open_sink())
    while sink is None:  # outside the bands, which have a ladder of their own
        family.vae.descend(message)
        sink, message = attempt(fill, open_sink())
    return StageStats(
        stage="decode",
        seconds=round(time.monotonic() - begun, 3),
        peak_bytes=peak_device_bytes(family.device),
        tiles=tiles,
        retries=family.vae.retries - retries,
        recomputed=family.vae.recomputed - recomputed,
    )
