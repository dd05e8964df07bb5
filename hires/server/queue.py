"""The jobs of a server: one at a time per device, in the order that `schedule` chooses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from hires.client.documents import ENDED, JobDocument
from hires.errors import BudgetError, Cancelled, HiresError, RequestError
from hires.events import Event
from hires.planning.plan import MemoryPlan
from hires.server.bodies import AnyTask, add_seeds, digest, without_seed
from hires.server.errors import ConflictError, QueueFullError
from hires.server.job import Job, read
from hires.server.schedule import LOOK_AHEAD, choose, planners
from hires.server.settings import Library, Settings
from hires.server.storage.retention import Kept, folder_bytes, over, saved_outputs
from hires.server.storage.staging import Staging, is_unfinished, make_private
from hires.server.worker import Estimate, Worker

log = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
MOST_ATTEMPTS = 3
"""A job that the server stopped at this often is given up."""
Prepare = Callable[[AnyTask, Path, int], AnyTask]
"""Called with a task, its job's folder and its index; puts its pictures there and returns the task that names them."""
SEED_BITS = 32
TAKEN_IN_AT_ONCE = 2
"""How many requests may decode their pictures at a time."""
Planned = TypeVar("Planned")


class Skipped(Cancelled):
    """The picture in progress is left out."""


class JobQueue:
    """Jobs by id. Threads may call all methods; `start` reads what an earlier server left and begins to work.

    Args:
        settings: of the server.
        library: what jobs may name.
        workers: by default one for each of the settings' devices.
    """

    def __init__(self, settings: Settings, library: Library, workers: Sequence[Worker] | None = None) -> None:
        self.settings, self.library = settings, library
        self.folder = settings.folder / "jobs"
        self.staging = Staging(settings.folder / "incoming")
        self.workers = [Worker(settings, library, device) for device in settings.devices] if workers is None else [*workers]
        stand_for = planners([worker.spec for worker in self.workers])
        self._planners = {worker: self.workers[i] for worker, i in zip(self.workers, stand_for, strict=True)}
        self.taking_in = asyncio.Semaphore(TAKEN_IN_AT_ONCE)
        """Held by the requests whose pictures are being decoded."""
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._arriving: set[str] = set()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._planning = threading.Lock()
        self._closing = False
        self._next = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Read the folder, queue the unfinished jobs in the order they came, and start to work."""
        self.staging.clear()
        make_private(self.folder)
        with self._lock:
            for job in sorted(self._stored(), key=lambda job: job.sequence):
                self._restore(job)
        self.make_room()
        for index, worker in enumerate(self.workers):
            thread = threading.Thread(target=self._work, args=(worker,), name=f"hires-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _stored(self) -> Iterator[Job]:
        """The jobs of the folder, where what is left of requests that never became one is cleared."""
        for path in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            job = read(path)
            if job is not None:
                yield job
            elif ID.fullmatch(path.name) and is_unfinished(path):
                self.staging.discard(path)

    def _restore(self, job: Job) -> None:
        """Take in a job of an earlier server."""
        self._next = max(self._next, job.sequence + 1)
        if not job.durable:
            self.staging.discard(job.folder)
            return
        self._jobs[job.id] = job
        if job.status in ENDED:
            return
        if job.attempts >= MOST_ATTEMPTS:
            job.error = f"the server stopped {job.attempts} times at this job; ask for a smaller size or budget"
            self._end(job, "failed")
            return
        job.status, job.tasks = "queued", self._name_models(job.tasks)
        self._waiting.append(job)

    def close(self, timeout: float = 30.0) -> None:
        """Stop after the tile in progress; unfinished durable jobs continue at the next start."""
        with self._changed:
            self._closing = True
            for job in self._running:
                job.stop = job.stop or "shutdown"
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout)
        with self._lock:
            for job in [*self._waiting, *self._running]:
                if not job.ended.done():
                    job.ended.set_result(None)

    def submit(
        self,
        tasks: Sequence[AnyTask],
        *,
        id: str | None = None,
        durable: bool = True,
        origin: str = "jobs",
        prepare: Prepare | None = None,
    ) -> Job:
        """Check a job's tasks, store the job and queue it.

        It is planned on every kind of device. A task that names no model gets the one that is the default now.

        id: the client's own, so that a request sent again gets the same job; requests of one id wait for each other.
        QueueFullError; ConflictError where another job has the id; RequestError for what runs on none of the devices.
        """
        name = uuid.uuid4().hex if id is None else id
        if not ID.fullmatch(name):
            raise RequestError(f"id {name[:80]!r}: give 8 to 64 letters, digits, - or _")
        request_digest = "" if id is None else digest(tasks)
        with self._reserved(name, request_digest) as same:
            if same is not None:
                return same
            with self.staging.open() as opened:
                folder = opened / name
                named = self._name_models(tasks)
                prepared = [task if prepare is None else prepare(task, folder, index) for index, task in enumerate(named)]
                job = Job(
                    id=name,
                    sequence=0,
                    tasks=list(add_seeds(prepared, lambda: secrets.randbits(SEED_BITS))),
                    folder=folder,
                    durable=durable,
                    origin=origin,
                    request_digest=request_digest,
                )
                job.estimates = self._estimates(job)
                self._enqueue(job)
                return job

    @contextmanager
    def _reserved(self, name: str, request_digest: str) -> Iterator[Job | None]:
        """Hold an id while its job is prepared, after those who hold it; gives the job where the same request has one by then.

        ConflictError where another request has it.
        """
        with self._changed:
            self._changed.wait_for(lambda: name not in self._arriving)
            same = self._jobs.get(name)
            if same is not None and same.request_digest != request_digest:
                raise ConflictError(f"id {name}: is another job's; give a new one")
            if same is None:
                self._check_room()
                self._arriving.add(name)
        if same is not None:
            yield same
            return
        try:
            yield None
        finally:
            with self._changed:
                self._arriving.discard(name)
                self._changed.notify_all()

    def plan(self, task: AnyTask, folder: Path) -> MemoryPlan | None:
        """What a task would do on the first kind of device that it fits; None without a diffusion model. Errors of `submit`."""
        return next(iter(self._where_it_fits(lambda planner: planner.plan(task, folder)).values()))

    def _name_models(self, tasks: Sequence[AnyTask]) -> list[AnyTask]:
        """The same tasks; those without a model get the default, which may be another one by the time they run."""
        if all(task.model is not None for task in tasks):
            return [*tasks]
        default = self.library.default_model().name
        return [task if task.model is not None else task.model_copy(update={"model": default}) for task in tasks]

    def _estimates(self, job: Job) -> dict[Worker, tuple[Estimate, ...]]:
        """What the tasks of a job take on each kind of device that can run all that are left. Errors of `submit`."""
        keys, done = [without_seed(task) for task in job.tasks], len(job.pictures)
        left = dict(zip(keys[done:], job.tasks[done:], strict=True))

        def estimate(planner: Worker) -> tuple[Estimate, ...]:
            each = {key: planner.estimate(task, job.folder) for key, task in left.items()}
            return tuple(each.get(key, Estimate(seconds=0.0)) for key in keys)

        return self._where_it_fits(estimate)

    def _where_it_fits(self, plan: Callable[[Worker], Planned]) -> dict[Worker, Planned]:
        """What `plan` gives on each kind of device where it gives anything; else the error of the kind with most memory."""
        planned, errors = {}, []
        for planner in dict.fromkeys(self._planners.values()):
            try:
                planned[planner] = plan(planner)
            except RequestError as error:
                errors.append((isinstance(error, BudgetError), planner.spec.budget_bytes, error))
        if not planned:
            raise max(errors, key=lambda each: each[:2])[2]
        return planned

    def _check_room(self) -> None:
        if len(self._waiting) >= self.settings.limits.waiting:
            raise QueueFullError(f"{len(self._waiting)} jobs wait, the most that this server takes; try again later")

    def _enqueue(self, job: Job) -> None:
        """Store a prepared job among the others and let it wait."""
        with self._changed:
            self._check_room()
            job.sequence, job.created = self._next, time.time()  # together, so that older is longer waiting
            job.save()
            job.move(self.folder / job.id)
            self._next += 1
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()  # not every worker can run it

    def get(self, name: str) -> Job | None:
        """The job with this id, or None."""
        with self._lock:
            return self._jobs.get(name)

    def documents(self) -> list[JobDocument]:
        """All durable jobs as `describe` gives them, the latest first."""
        with self._lock:
            return [self.describe(job) for job in sorted(self._jobs.values(), key=lambda job: -job.sequence) if job.durable]

    def describe(self, job: Job) -> JobDocument:
        """What `GET /jobs/{id}` answers."""
        with self._lock:
            position = self._waiting.index(job) if job in self._waiting else None
            return job.to_json(position)

    def running(self) -> Job | None:
        """The running job that came first; None where every device is idle."""
        with self._lock:
            return min(self._running, key=lambda job: job.sequence, default=None)

    def count(self) -> int:
        """Jobs that are waiting or running."""
        with self._lock:
            return len(self._waiting) + len(self._running)

    def cancel(self, job: Job) -> None:
        """A waiting job ends at once, a running one after the tile in progress; an ended one stays as it is."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
            elif job in self._running:
                job.stop = "cancel"

    def skip(self, job: Job) -> None:
        """Leave the picture in progress out and go on with the next."""
        with self._lock:
            job.skipping = True

    def unload(self) -> None:
        """Let the models of all devices go, each after the task in progress."""
        with ThreadPoolExecutor(len(self.workers)) as pool:
            for unloading in [pool.submit(worker.unload) for worker in self.workers]:
                unloading.result()

    def load_default(self) -> None:
        """Load the default model on every device that it fits, each after the task in progress. HiresError if it fits none."""
        name = self.library.default_model().name
        with ThreadPoolExecutor(len(self.workers)) as pool:
            loads = [pool.submit(worker.load, name) for worker in self.workers]
        errors = [error for load in loads if (error := load.exception()) is not None]
        unexpected = [error for error in errors if not isinstance(error, HiresError)]
        if unexpected or len(errors) == len(loads):
            raise (unexpected or errors)[0]
        for error in errors:
            log.warning("%s was not loaded everywhere: %s", name, error)

    def keep(self, job: Job) -> None:
        """Make the ended job of a waiting client durable, as those of `POST /jobs` are."""
        with self._lock:
            job.durable = True
            job.save()

    def forget(self, job: Job) -> None:
        """Remove an ended job and its files."""
        with self._lock:
            if job.status in ENDED:
                self._jobs.pop(job.id, None)
                self.staging.discard(job.folder)

    def _work(self, worker: Worker) -> None:
        """Run one job after another until the queue closes; a thread per worker."""
        while not self._closing:
            job = self._next_job(worker)
            if job is None:  # outside the lock: others may queue jobs meanwhile
                worker.unload(after_idle=0.0 if self._closing else self.settings.idle_unload_seconds)
                continue
            status = self._run_job(job, worker)
            with self._changed:
                self._running.remove(job)
                if status == "queued":
                    with contextlib.suppress(HiresError):
                        job.status, job.attempts = "queued", job.attempts - 1
                        job.save()
                else:
                    self._end(job, status)
            self.make_room()

    def _next_job(self, worker: Worker) -> Job | None:
        """Wait for a job that a worker can run and mark it as running.

        None when the worker was idle for `idle_unload_seconds`, and when the queue closes. Jobs of an earlier server are
        planned once they are among the `LOOK_AHEAD` oldest, and not chosen before.
        """
        planner = self._planners[worker]
        while True:
            with self._changed:
                patience = max(0.0, self.settings.idle_unload_seconds - worker.idle_seconds)
                self._changed.wait_for(lambda: self._closing or self._within_reach(planner), patience)
                reach = self._within_reach(planner)
                if self._closing or not reach:
                    return None
                unplanned = next((job for job in reach[:LOOK_AHEAD] if job.estimates is None), None)
                if unplanned is None:
                    return self._take(worker, [job for job in reach if job.estimates is not None])
            self._plan_restored(unplanned)  # outside the lock: others may queue jobs meanwhile

    def _within_reach(self, planner: Worker) -> list[Job]:
        """The waiting jobs that a kind of device can run, or that have yet to be planned, in the order they came."""
        return [job for job in self._waiting if job.estimates is None or job.fits(planner)]

    def _take(self, worker: Worker, jobs: Sequence[Job]) -> Job:
        """Mark one of the jobs that a worker can run as running."""
        planner, now = self._planners[worker], time.time()
        chosen = choose([job.as_waiting(planner, now) for job in jobs], worker.resident)
        assert chosen is not None, "a job is within reach"
        job = jobs[chosen]
        self._waiting.remove(job)
        self._running.append(job)
        job.status, job.started, job.attempts = "running", now, job.attempts + 1
        with contextlib.suppress(HiresError):
            job.save()
        return job

    def _plan_restored(self, job: Job) -> None:
        """Plan a job of an earlier server; one that runs on no device fails with the error of its plan."""
        with self._planning:
            if job.estimates is not None:
                return
            try:
                job.estimates = self._estimates(job)
            except Exception as error:  # noqa: BLE001  one job's defect must not end the server; `fail` logs it
                with self._changed:
                    if job in self._waiting:  # it was not cancelled meanwhile
                        self._waiting.remove(job)
                        job.fail(error)
                        self._end(job, "failed")

    def _run_job(self, job: Job, worker: Worker) -> str:
        """Make the pictures that are not finished and return the job's new status."""
        try:
            for index in range(len(job.pictures), len(job.tasks)):
                self._make_picture(job, index, worker)
            job.meter.finish()
        except Cancelled:
            return "queued" if job.stop == "shutdown" and job.durable else "cancelled"
        except Exception as error:  # noqa: BLE001  one job's defect must not end the server; `fail` logs it
            job.fail(error)
            return "failed"
        return "done" if job.pictures or not job.tasks else "cancelled"

    def _make_picture(self, job: Job, index: int, worker: Worker) -> None:
        task, job.skipping = job.tasks[index], False
        assert job.estimates is not None, "only a planned job is taken"
        estimate = job.estimates[self._planners[worker]][index]
        job.meter.begin(index)

        def hear(event: Event) -> None:
            job.meter.hear(event)
            if job.stop:
                raise Cancelled(f"job {job.id} was stopped")
            if job.skipping:
                raise Skipped(f"picture {index} of job {job.id} was left out")

        try:
            picture = worker.run(task, job.folder, f"result-{index}", hear)
        except Skipped:
            job.clear()
            return
        worker.used_last = estimate.model or worker.used_last
        with self._lock:
            job.pictures.append(picture)
        with contextlib.suppress(HiresError):
            job.save()

    def _end(self, job: Job, status: str) -> None:
        job.status, job.finished = status, time.time()
        job.clear()
        with contextlib.suppress(HiresError):
            job.save()
        if not job.ended.done():
            job.ended.set_result(None)

    def make_room(self) -> None:
        """Forget the oldest ended jobs, and delete the oldest saved outputs, beyond those whose files stay."""
        limits = self.settings.limits
        with self._lock:
            ended = sorted(
                (job for job in self._jobs.values() if job.status in ENDED and job.durable), key=lambda job: job.sequence
            )
            most = max(0, len(ended) - limits.kept)
            for job in ended[:most]:
                self.forget(job)
            if limits.kept_bytes is None:
                return
            kept = [Kept(job.finished or 0.0, folder_bytes(job.folder), partial(self.forget, job)) for job in ended[most:]]
            for each in over([*kept, *saved_outputs(self.settings.folder / "outputs")], limits.kept_bytes):
                each.remove()
