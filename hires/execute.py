"""Carrying a plan out in memory: load, denoise, decode. `engine` makes the plan and writes the file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hires.checkpoints.spec import ModelSpec
from hires.delivery import Delivery, OpenSink
from hires.devices.memory import peak_resident_bytes
from hires.devices.probe import TORCH_DTYPE
from hires.errors import MemoryLadderError
from hires.events import Event, OnEvent
from hires.images.whole import on_canvas
from hires.models.attention_processors import attention_backend
from hires.options.render import RenderRequest
from hires.pipelines import progressive
from hires.pipelines.decode import colour_fixer, decode, masked_fixer
from hires.pipelines.load import load_family
from hires.planning.plan import DecodePlan, MemoryPlan, RenderResult
from hires.resume.journal import NO_JOURNAL, Journal
from hires.tiling.retry import Ladder, is_out_of_memory, twice
from hires.units import gib


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


def _describe(made: MemoryPlan) -> Callable[[DecodePlan], str]:
    """A rung of the decode ladder in words, with its predicted peak."""
    peaks = {rung.decode: rung.peak_bytes for rung in made.ladder if rung.stage == "decode"}
    peaks[made.decode] = next(cost.peak_bytes for cost in made.costs if cost.stage == "decode")

    def describe(decode: DecodePlan) -> str:
        return f"decode {decode}, predicted peak {gib(peaks[decode] or 0)}"

    return describe
