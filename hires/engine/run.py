"""Carry out a plan: load, denoise, decode, write."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from hires.checkpoints.locate import missing
from hires.checkpoints.spec import ModelSpec
from hires.devices import calibration
from hires.devices.calibration import calibrated
from hires.devices.describe import budget_of
from hires.devices.memory import peak_resident_bytes
from hires.devices.probe import TORCH_DTYPE
from hires.engine.fallback import _approximate, _cheaper, _unkept
from hires.engine.output import Delivery, OpenSink, parameters
from hires.engine.requests import with_captions
from hires.engine.results import RenderResult
from hires.errors import MemoryLadderError
from hires.events import Event, OnEvent
from hires.images.whole import on_canvas
from hires.models.attention_processors import attention_backend
from hires.options.render import JournalOptions, RenderRequest
from hires.pipelines import progressive
from hires.pipelines.decode import colour_fixer, decode, masked_fixer
from hires.pipelines.load import load_family
from hires.planning import planner
from hires.planning.plan import DecodePlan, MemoryPlan
from hires.resume.journal import NO_JOURNAL, Journal
from hires.tiling.retry import Ladder, is_out_of_memory, twice
from hires.units import gib

if TYPE_CHECKING:
    from hires.devices.memory import FreedPages


def _carried_out(
    request: RenderRequest,
    spec: ModelSpec,
    file: Delivery,
    device: str,
    memory: tuple[str | int | None, str | int | None],
    picture: NDArray[np.uint8] | None,
    on_event: OnEvent | None,
    edges: NDArray[np.uint8] | None = None,
    journal: JournalOptions | None = None,
    mask: NDArray[np.uint8] | None = None,
) -> RenderResult:
    """Check what is there, plan, run, write. What is unfinished when it ends otherwise stays in the journal."""
    try:
        return _delivered(request, spec, file, device, memory, picture, on_event, edges, journal, mask)
    except BaseException:
        file.abort()
        raise


def _delivered(
    request: RenderRequest,
    spec: ModelSpec,
    file: Delivery,
    device: str,
    memory: tuple[str | int | None, str | int | None],
    picture: NDArray[np.uint8] | None,
    on_event: OnEvent | None,
    edges: NDArray[np.uint8] | None,
    journal: JournalOptions | None,
    mask: NDArray[np.uint8] | None,
) -> RenderResult:
    from hires.devices.memory import freed_pages
    from hires.devices.probe import choose_device, probe
    from hires.resume.journal import NO_JOURNAL, open_journal

    chosen = choose_device(device)
    if spec.missing:
        raise missing(spec.missing, spec.facts)
    request = with_captions(request)
    vram, ram = map(budget_of, memory)
    facts = calibrated(probe(chosen, vram, ram or 0), calibration.load(calibration.cache_folder()))
    made = planner.plan(request, spec, facts)
    file.head = parameters(request, made)
    tell: OnEvent = on_event or (lambda event: None)

    def run(request: RenderRequest, made: MemoryPlan, kept: Journal | None = None) -> RenderResult:
        with freed_pages(_freed(made, chosen.type, ram)):
            return run_plan(request, made, spec, chosen, tell, picture, edges, kept or NO_JOURNAL, file, mask)

    if file.path is None or journal is None:
        return file.finish(_unkept(request, made, spec, facts, run), request, tell)
    from hires.resume.fingerprint import describe_job

    job = describe_job(request, made, spec, (picture, edges, mask))
    kept = open_journal(file.path, job, resume=journal.resume, restart=journal.restart, seconds=journal.seconds)
    file.within = kept.folder
    try:
        drawn = run(request, made, kept)
    except MemoryLadderError as error:
        kept.close()
        cheaper = _cheaper(request, spec, error)
        kept.remove()  # of another picture than the one that is drawn now
        drawn = _approximate(cheaper, spec, facts, run)
    except BaseException:
        kept.close()
        raise
    try:
        result = file.finish(drawn, request, tell)
    except BaseException:
        kept.close()
        raise
    kept.remove()
    return result


def _freed(made: MemoryPlan, device: str, ram: int | None) -> FreedPages:
    """What becomes of freed memory: it goes back where host memory is counted, and is kept where a third more has room."""
    if ram is not None:
        return "returned"
    return "kept" if device == "cpu" and 4 * made.peak_bytes <= 3 * made.budget_bytes else "usual"


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
