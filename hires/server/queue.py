"""The jobs of a server: run in the order they came, one at a time per device."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from hires.client.documents import ENDED, JobDocument
from hires.errors import Cancelled, HiresError, RequestError
from hires.events import Event
from hires.server.bodies import AnyTask, add_seeds, digest, without_seed
from hires.server.errors import ConflictError, QueueFullError
from hires.server.job import Job, read
from hires.server.settings import Library, Settings
from hires.server.worker import Worker

log = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
MOST_ATTEMPTS = 3
"""A job that the server stopped at this often is given up."""
Prepare = Callable[[AnyTask, Path, int], AnyTask]
"""Called with a task, its job's folder and its index; puts its pictures there and returns the task that names them."""
SEED_BITS = 32


class Skipped(Cancelled):
    """The picture in progress is left out."""


class JobQueue:
    """Jobs by id. Threads may call all methods; `start` reads what an earlier server left and begins to work."""

    def __init__(self, settings: Settings, library: Library) -> None:
        self.settings, self.library = settings, library
        self.folder = settings.folder / "jobs"
        self.workers = [Worker(settings, library, device) for device in settings.devices]
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closing = False
        self._next = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Read the folder, queue the unfinished jobs in the order they came, and start to work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        jobs = [read(path) for path in sorted(self.folder.iterdir()) if path.is_dir()]
        with self._lock:
            for job in sorted((job for job in jobs if job is not None), key=lambda job: job.sequence):
                self._restore(job)
        for index, worker in enumerate(self.workers):
            thread = threading.Thread(target=self._work, args=(worker,), name=f"hires-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _restore(self, job: Job) -> None:
        """Take in a job of an earlier server."""
        self._next = max(self._next, job.sequence + 1)
        if not job.durable:
            job.remove()
            return
        self._jobs[job.id] = job
        if job.status in ENDED:
            return
        if job.attempts >= MOST_ATTEMPTS:
            job.error = f"the server stopped {job.attempts} times at this job; ask for a smaller size or budget"
            self._end(job, "failed")
            return
        job.status = "queued"
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

        id: the client's own, so that a request sent again gets the same job. QueueFullError; ConflictError where another job
        has the id; RequestError for what cannot be run.
        """
        name = uuid.uuid4().hex if id is None else id
        if not ID.fullmatch(name):
            raise RequestError(f"id {name[:80]!r}: give 8 to 64 letters, digits, - or _")
        request_digest = "" if id is None else digest(tasks)
        with self._lock:
            same = self._jobs.get(name)
            if same is not None:
                if same.request_digest != request_digest:
                    raise ConflictError(f"id {name}: is another job's; give a new one")
                return same
            self._check_room()
        folder = self.folder / name
        try:
            prepared = [task if prepare is None else prepare(task, folder, index) for index, task in enumerate(tasks)]
            worker = self.workers[0]
            distinct = {without_seed(task): task for task in prepared}
            weights = {key: worker.weights(task, worker.plan(task, folder)) for key, task in distinct.items()}
            job = Job(
                id=name,
                sequence=0,
                tasks=list(add_seeds(prepared, lambda: secrets.randbits(SEED_BITS))),
                folder=folder,
                durable=durable,
                origin=origin,
                request_digest=request_digest,
                weights=weights,
            )
            return self._enqueue(job)
        except BaseException:
            with self._lock:
                if name not in self._jobs:
                    shutil.rmtree(folder, ignore_errors=True)
            raise

    def _check_room(self) -> None:
        if len(self._waiting) >= self.settings.limits.waiting:
            raise QueueFullError(f"{len(self._waiting)} jobs wait, the most that this server takes; try again later")

    def _enqueue(self, job: Job) -> Job:
        """Store a job and let it wait; return the job of its id where there is one by now."""
        with self._changed:
            if job.id in self._jobs:
                return self._jobs[job.id]
            self._check_room()
            job.sequence = self._next
            job.save()
            self._next += 1
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify()
            return job

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
        for worker in self.workers:
            worker.unload()

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
                job.remove()

    def _work(self, worker: Worker) -> None:
        """Run one job after another until the queue closes; a thread per worker."""
        while not self._closing:
            job = self._next_job()
            if job is None:
                worker.unload()  # outside the lock: others may queue jobs meanwhile
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
            self._forget_oldest()

    def _next_job(self) -> Job | None:
        """Wait for a job and mark it as running; None after `idle_unload_seconds` without one, and when the queue closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing, self.settings.idle_unload_seconds)
            if self._closing or not self._waiting:
                return None
            job = self._waiting.pop(0)
            self._running.append(job)
            job.status, job.started, job.attempts = "running", time.time(), job.attempts + 1
            with contextlib.suppress(HiresError):
                job.save()
            return job

    def _run_job(self, job: Job, worker: Worker) -> str:
        """Make the pictures that are not finished and return the job's new status."""
        try:
            for index in range(len(job.pictures), len(job.tasks)):
                self._make_picture(job, index, worker)
            job.meter.finish()
        except Cancelled:
            return "queued" if job.stop == "shutdown" and job.durable else "cancelled"
        except HiresError as error:
            log.warning("job %s: %s", job.id, error)
            job.fail(error)
            return "failed"
        except Exception as error:  # one job's defect must not end the server
            log.exception("job %s", job.id)
            job.fail(error)
            job.error = f"an error in hires, {type(error).__name__}: {str(error)[:300]}; the server's log has more"
            return "failed"
        return "done" if job.pictures or not job.tasks else "cancelled"

    def _make_picture(self, job: Job, index: int, worker: Worker) -> None:
        task, job.skipping = job.tasks[index], False
        key = without_seed(task)
        if key not in job.weights:  # an earlier server planned it
            job.weights[key] = worker.weights(task, worker.plan(task, job.folder))
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

    def _forget_oldest(self) -> None:
        """Forget the oldest ended jobs beyond those whose files stay."""
        with self._lock:
            ended = sorted(
                (job for job in self._jobs.values() if job.status in ENDED and job.durable), key=lambda job: job.sequence
            )
            for job in ended[: max(0, len(ended) - self.settings.limits.kept)]:
                self.forget(job)
