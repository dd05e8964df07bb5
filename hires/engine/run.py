"""Carry out a render job: plan, load, denoise, decode, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from hires.checkpoints.locate import missing
from hires.checkpoints.model import ModelSpec
from hires.devices import calibration
from hires.devices.calibration import calibrated
from hires.devices.describe import budget_of
from hires.devices.memory import FreedPages, freed_pages, peak_resident_bytes
from hires.devices.probe import TORCH_DTYPE, choose_device, probe
from hires.devices.spec import DeviceSpec
from hires.engine.fallback import cheaper_job, plan_cheaper
from hires.engine.job import RenderJob, SharedBase
from hires.engine.loaded import Demand, LoadedModels
from hires.engine.output import Delivery, OpenSink, parameters
from hires.engine.requests import with_captions
from hires.engine.results import RenderResult
from hires.errors import MemoryLadderError, RunError
from hires.events import Event, OnEvent, StageStats
from hires.images.whole import on_canvas
from hires.models.attention_processors import attention_backend
from hires.options.render import RenderRequest
from hires.pipelines import progressive
from hires.pipelines.base import Runtime, Session
from hires.pipelines.clock import Part, RenderClock, as_part, parts_of
from hires.pipelines.decode import colour_fixer, decode, masked_fixer
from hires.pipelines.load import open_session, prepared, prompted_by
from hires.planning import planner
from hires.planning.plan import DecodePlan, MemoryPlan
from hires.planning.planner import Together
from hires.resume import journal as journals
from hires.resume.fingerprint import describe_job
from hires.resume.journal import NO_JOURNAL, Begun, FileJournal, Journal
from hires.sampling.registry import SAMPLER_FACTS
from hires.tiling.retry import Ladder, is_out_of_memory, twice
from hires.units import gib

log = logging.getLogger(__name__)


def run(job: RenderJob, models: LoadedModels | None = None) -> RenderResult:
    """Plan a job and render it, and cheaper pictures if it runs out of memory and the request allows them.

    models: what stays in memory from one job to the next; None loads for this job alone.

    Work that is unfinished when it fails or is cancelled stays in the job's journal. MemoryLadderError if nothing that the
    request allows has room.
    """
    models = LoadedModels(stay=False) if models is None else models
    job, device, machine = on_device(job, models)
    plan = planner.plan(job.request, job.spec, machine)
    if job.base is not None:
        plan = plan.with_peak(job.base.stats.stage, job.base.peak_bytes)
    clock = RenderClock(job.on_event, str(device), models.paces.get(plan.model))
    job = replace(job, on_event=clock.hear)
    while True:
        clock.follow(parts_of(plan) if job.base is None else parts_after(job.base, plan))
        try:
            result = deliver(job, plan, device, models)
            models.paces[plan.model] = clock.paces()
            return result
        except MemoryLadderError as error:
            cheaper = cheaper_job(job, error)
        discard_journal(job)  # it is of another picture than the one that is drawn now
        job, plan = cheaper, plan_cheaper(cheaper, machine)


def on_device(job: RenderJob, models: LoadedModels) -> tuple[RenderJob, torch.device, DeviceSpec]:
    """A job with its captions, its device, and the facts of that. ModelError where parts of the model are missing."""
    device = choose_device(job.device)
    if job.spec.missing:
        raise missing(job.spec.missing, job.spec.facts)
    machine = probe(device, budget_of(job.vram), budget_of(job.ram) or 0, models.device_bytes)
    return (
        replace(job, request=with_captions(job.request)),
        device,
        calibrated(machine, calibration.load(calibration.cache_folder())),
    )


def deliver(job: RenderJob, plan: MemoryPlan, device: torch.device, models: LoadedModels) -> RenderResult:
    """Render a plan into the job's output: whole at the end, or not there."""
    head = parameters(job.request, plan)
    with open_journal(job, plan) as journal, job.output.open(head, folder_of(journal)) as output:
        with freed_pages(page_policy(job, plan, device)):
            result = execute(job, plan, device, journal, output, models)
        return output.finish(result, job.request, job.tell)


@contextmanager
def open_journal(job: RenderJob, plan: MemoryPlan) -> Iterator[Journal]:
    """The journal of a job's unfinished work: kept on failure, removed on success."""
    if job.base is not None:
        yield Begun(job.base.latents)
        return
    if job.output.path is None or job.journal is None:
        yield NO_JOURNAL
        return
    options, images = job.journal, job.images
    described = describe_job(job.request, plan, job.spec, (images.init, images.edges, images.mask))
    journal = journals.open_journal(
        job.output.path, described, resume=options.resume, restart=options.restart, seconds=options.seconds
    )
    try:
        yield journal
    except BaseException:
        journal.close()
        raise
    journal.remove()


def discard_journal(job: RenderJob) -> None:
    """Remove the journal of a job that is given up."""
    if job.output.path is not None and job.journal is not None:
        FileJournal(journals.folder_of(job.output.path)).remove()


def folder_of(journal: Journal) -> Path | None:
    """The folder in which unfinished files may lie, None without a journal."""
    return journal.folder if isinstance(journal, FileJournal) else None


def page_policy(job: RenderJob, plan: MemoryPlan, device: torch.device) -> FreedPages:
    """What becomes of freed memory: returned if `ram` limits the process, kept on a CPU with room for a third more."""
    if job.ram is not None:
        return "returned"
    return "kept" if device.type == "cpu" and 4 * plan.peak_bytes <= 3 * plan.budget_bytes else "usual"


def run_plan(
    request: RenderRequest, plan: MemoryPlan, spec: ModelSpec, device: torch.device, on_event: OnEvent
) -> RenderResult:
    """Render a plan that is already made, from text alone, into an array; errors as in `execute`."""
    job = RenderJob(request=request, spec=spec, output=Delivery(None), on_event=on_event)
    with job.output.open() as output:
        return output.finish(execute(job, plan, device, NO_JOURNAL, output, LoadedModels(stay=False)), request, on_event)


def execute(
    job: RenderJob, plan: MemoryPlan, device: torch.device, journal: Journal, open_sink: OpenSink, models: LoadedModels
) -> RenderResult:
    """Load the model, denoise and decode into a sink, which is left open.

    MemoryLadderError if even the smallest setting of the plan's ladder runs out of memory.
    """
    try:
        return _execute(job, plan, device, journal, open_sink, models)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0][:200]
    raise MemoryLadderError(  # outside `except`, where the traceback would hold what was allocated
        f"out of memory outside the ladder ({reason}); planned peak {gib(plan.peak_bytes)} of {gib(plan.budget_bytes)}: "
        f"close other programs or give a smaller `size`"
    )


def _execute(
    job: RenderJob, plan: MemoryPlan, device: torch.device, journal: Journal, open_sink: OpenSink, models: LoadedModels
) -> RenderResult:
    started, request, images = time.monotonic(), job.request, job.images
    backend = attention_backend(job.spec, plan.latent_grid.tile, device, TORCH_DTYPE[plan.dtype], request.attention)
    plan = replace(plan, backends=(("attention", backend),))
    job.tell(Event(stage="load", done=0, total=1))
    ladder = decode_ladder(plan)
    runtime = Runtime.of(request, plan, device, ladder)
    init = None if images.init is None else on_canvas(images.init, request.size, plan.canvas)
    condition = init if images.edges is None else on_canvas(images.edges, request.size, plan.canvas)
    demand = Demand(job=job, plan=plan, runtime=runtime)
    prompted, texts = prompted_by(request, job.spec, plan), models.conditions(demand, journal)
    family = twice(lambda: models.family(demand), "loading")
    job.tell(Event(stage="load", done=1, total=1))
    try:
        session = twice(lambda: prepared(open_session(family, texts, request, runtime, condition), prompted), "loading")
        denoised, decoded = draw(job, plan, session, journal, open_sink)
    finally:
        models.settle(family)
    return RenderResult(
        path=None,
        size=request.size,
        seed=request.seed,
        plan=with_decode_used(plan, decoded, ladder),
        stats=(*denoised.stats, decoded),
        seconds=time.monotonic() - started + (0.0 if job.base is None else job.base.stats.seconds),
        peak_rss_bytes=peak_resident_bytes(),
    )


def draw(
    job: RenderJob, plan: MemoryPlan, session: Session, journal: Journal, open_sink: OpenSink
) -> tuple[progressive.Denoised, StageStats]:
    """Denoise and decode a session into a sink, which is left open: what each of the two took."""
    request, images = job.request, job.images
    init = None if images.init is None else on_canvas(images.init, request.size, plan.canvas)
    mask = None if images.mask is None else on_canvas(images.mask, request.size, plan.canvas)[..., 0]
    denoised = progressive.run(session, plan, request.seed, job.tell, init, journal, mask)
    if job.base is not None:
        denoised.stats[0] = job.base.stats
    fix = colour_fixer(session, plan, denoised, init)
    if mask is not None:
        assert init is not None, "a mask is of a picture"
        fix = masked_fixer(init, mask, fix)
    rows_journal = NO_JOURNAL if fix else journal  # fixed rows depend on more than the latents
    return denoised, decode(session, denoised.latents, lambda: open_sink(request.size), job.tell, rows_journal, fix)


def decode_ladder(plan: MemoryPlan) -> Ladder[DecodePlan]:
    """The plan's exact ways to decode, from the chosen one down."""
    exact = [rung.decode for rung in plan.ladder if rung.stage == "decode" and rung.exact]
    return Ladder([plan.decode, *exact], decode_words(plan))


def decode_words(plan: MemoryPlan) -> Callable[[DecodePlan], str]:
    """A function that names a way to decode, with its predicted peak."""
    peaks = {rung.decode: rung.peak_bytes for rung in plan.ladder if rung.stage == "decode"}
    peaks[plan.decode] = next(cost.peak_bytes for cost in plan.costs if cost.stage == "decode")

    def words(decode: DecodePlan) -> str:
        return f"decode {decode}, predicted peak {gib(peaks[decode] or 0)}"

    return words


def with_decode_used(plan: MemoryPlan, decoded: StageStats, ladder: Ladder[DecodePlan]) -> MemoryPlan:
    """The plan with the way that decoding took after running out of memory, and a note on it."""
    if decoded.stage == "decode (tiny)":
        used = replace(plan.decode, policy="tiny", band_rows=0)
        note = "approximation: every exact way to decode ran out of memory, the tiny autoencoder did it"
    elif ladder.taken:
        used, note = ladder.rung, f"ran out of memory: decoded {ladder.rung} instead of {plan.decode}"
    else:
        return plan
    return replace(plan, decode=used, notes=(*plan.notes, note))


def with_shared_bases(jobs: Sequence[RenderJob], models: LoadedModels) -> list[RenderJob]:
    """The first one or more of these jobs, their first stage drawn in shared batches where that saves calls of the network.

    The jobs differ in prompt and seed alone. Each picture equals that of its job alone to rounding: in the order of sums within
    a batch. Where one of them cannot be drawn with the others, each is left to draw its own.
    """
    first, device, machine = on_device(jobs[0], models)
    plan = planner.plan(first.request, first.spec, machine)
    together = planner.pictures_together(plan, first.spec, machine)
    group = list(jobs[: together.pictures])
    if len(group) < 2 or not may_share(group, plan):
        return list(jobs[:1])
    began, clock = time.monotonic(), RenderClock(first.on_event, str(device), models.paces.get(plan.model))
    clock.follow(parts_for(len(group), plan))
    try:
        bases = draw_bases(group, plan, together, models, clock)
    except (RunError, torch.OutOfMemoryError) as error:
        log.warning("%d pictures cannot share batches (%s); each is drawn alone", len(group), error)
        return [replace(group[0], on_event=as_part(first.tell, clock.fraction, 1.0, began)), *group[1:]]
    models.paces[plan.model] = clock.paces()
    listening = (as_part(first.tell, 0.0, 1.0, began), *(job.on_event for job in group[1:]))
    return [replace(job, base=base, on_event=tell) for job, base, tell in zip(group, bases, listening, strict=True)]


def parts_for(pictures: int, plan: MemoryPlan) -> dict[str, Part]:
    """The parts of the first of several pictures that share its first stage, which takes it the time of all."""
    parts = parts_of(plan)
    parts[plan.stages[0].name].planned *= pictures
    return parts


def parts_after(base: SharedBase, plan: MemoryPlan) -> dict[str, Part]:
    """The parts of a picture whose first stage is done."""
    parts = parts_for(base.pictures, plan)
    first = parts[plan.stages[0].name]
    first.share = first.recalled = 1.0
    return parts


def may_share(jobs: Sequence[RenderJob], plan: MemoryPlan) -> bool:
    """Whether pictures may share the batches of their first stage: it starts from noise, at steps that are the same for all."""
    stage = plan.stages[0]
    moved_apart = stage.shift_cells and len({job.request.seed for job in jobs}) > 1
    alone = any(job.images.given or job.output.path is not None for job in jobs)
    one_model = len({replace(job.request, prompt="", seed=0) for job in jobs}) == 1
    plain = one_model and all(prompted_by(job.request, job.spec, plan).script.plain for job in jobs)
    return SAMPLER_FACTS[stage.sampler].known and not moved_apart and not alone and plain


def draw_bases(
    jobs: Sequence[RenderJob], plan: MemoryPlan, together: Together, models: LoadedModels, clock: RenderClock
) -> list[SharedBase]:
    """The first stages of jobs, drawn together; errors as in `execute`."""
    first, device = jobs[0], choose_device(jobs[0].device)
    runtime = Runtime.of(first.request, plan, device, decode_ladder(plan))
    room = plan.with_peak(plan.stages[0].name, together.peak_bytes)
    cleaned = [replace(job, request=with_captions(job.request)) for job in jobs]
    demands = [Demand(job=job, plan=room, runtime=runtime) for job in cleaned]
    texts = [models.conditions(demand, NO_JOURNAL) for demand in demands]
    family = twice(lambda: models.family(demands[0]), "loading")
    try:
        joined = [each[0].concatenate(*each[1:]) for each in zip(*texts, strict=True)]
        prompted = prompted_by(cleaned[0].request, first.spec, plan)
        session = prepared(open_session(family, joined, first.request, runtime), prompted)
        with freed_pages(page_policy(first, plan, device)):
            seeds = [job.request.seed for job in jobs]
            latents, stats = progressive.first_stage(session, plan.stages[0], seeds, together.batch, clock.hear)
    finally:
        models.settle(family)
    own = replace(stats, seconds=round(stats.seconds / len(jobs), 3))
    others = replace(own, retries=0, recomputed=0)  # they are counted once
    bases = [SharedBase(latents=picture[None], stats=others, peak_bytes=together.peak_bytes) for picture in latents]
    return [replace(bases[0], stats=own, pictures=len(jobs)), *bases[1:]]
