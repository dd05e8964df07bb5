"""The jobs of a server: in the order they came, one at a time on each device, kept on disk until they are answered."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hires.errors import Cancelled, HiresError, RequestError
from hires.events import Event
from hires.server.errors import ConflictError, QueueFullError
from hires.server.job import ENDED, Job, read
from hires.server.settings import Library, Settings
from hires.server.tasks import seeded
from hires.server.worker import Worker

log = logging.getLogger(__name__)
ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
MOST_ATTEMPTS = 3  # starts of the server that a job may take with it
SEED_BITS = 32


class Skipped(Cancelled):
    """The picture in progress is left out."""


class JobQueue:
    """Jobs by id. Threads may call all methods; `start` reads what an earlier server left and begins to work."""

    def __init__(self, settings: Settings, library: Library) -> None:
        self.settings, self.library = settings, library
        self.folder = settings.folder / "jobs"
        self.runners = [Worker(settings, library, device) for device in settings.devices]
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closing = False
        self._next = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Read the folder, queue what is unfinished in the order it came, and work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [read(path) for path in sorted(self.folder.iterdir()) if path.is_dir()]
        with self._lock:
            for job in sorted((job for job in found if job is not None), key=lambda job: job.sequence):
                self._take_up(job)
        for index, runner in enumerate(self.runners):
            thread = threading.Thread(target=self._work, args=(runner,), name=f"hires-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _take_up(self, job: Job) -> None:
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
        """Stop after the tile in progress; unfinished jobs that live on go on at the next start."""
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
        tasks: Sequence[Any],
        *,
        id: str | None = None,
        durable: bool = True,
        origin: str = "jobs",
        prepare: Callable[[Any, Path, int], Any] | None = None,
    ) -> Job:
        """Check a job's tasks, write it down and queue it.

        id: the client's own, so that a request sent again gets the job that is there. prepare(task, folder, index): writes a
        task's pictures. QueueFullError; ConflictError where the id is another job's; RequestError for what cannot be run.
        """
        name = uuid.uuid4().hex if id is None else id
        if not ID.fullmatch(name):
            raise RequestError(f"id {name[:80]!r}: give 8 to 64 letters, digits, - or _")
        wanted = repr([task.model_dump(mode="json") for task in tasks]) if id is not None else ""
        with self._lock:
            there = self._jobs.get(name)
            if there is not None:
                if there.wanted != _hashed(wanted):
                    raise ConflictError(f"id {name}: is another job's; give a new one")
                return there
            self._check_room()
        folder = self.folder / name
        try:
            plain = [task if prepare is None else prepare(task, folder, index) for index, task in enumerate(tasks)]
            first = self.runners[0]
            distinct = {_but_for_seed(task): task for task in plain}
            weights = {kind: first.weights(task, first.plan(task, folder)) for kind, task in distinct.items()}
            drawn = list(seeded(plain, lambda: secrets.randbits(SEED_BITS)))
            job = Job(id=name, sequence=0, tasks=drawn, folder=folder, durable=durable, origin=origin, wanted=_hashed(wanted))
            job.weights = weights
            return self._queued(job)
        except BaseException:
            with self._lock:
                if name not in self._jobs:
                    Job(id=name, sequence=0, tasks=[], folder=folder).remove()
            raise

    def _check_room(self) -> None:
        if len(self._waiting) >= self.settings.limits.waiting:
            raise QueueFullError(f"{len(self._waiting)} jobs wait, the most that this server takes; try again later")

    def _queued(self, job: Job) -> Job:
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
        with self._lock:
            return self._jobs.get(name)

    def listed(self) -> list[dict[str, Any]]:
        """All jobs, the latest first."""
        with self._lock:
            return [self.describe(job) for job in sorted(self._jobs.values(), key=lambda job: -job.sequence) if job.durable]

    def describe(self, job: Job) -> dict[str, Any]:
        with self._lock:
            position = self._waiting.index(job) if job in self._waiting else None
            return job.to_json(position)

    def running(self) -> Job | None:
        """The job in progress that came first; None where every device is idle."""
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

    def keep(self, job: Job) -> None:
        """Let an ended job of a waiting client stay, as those of `POST /jobs` do."""
        with self._lock:
            job.durable = True
            job.save()

    def forget(self, job: Job) -> None:
        """Remove an ended job and its files."""
        with self._lock:
            if job.status in ENDED:
                self._jobs.pop(job.id, None)
                job.remove()

    def _work(self, runner: Worker) -> None:
        while (job := self._taken()) is not None:
            status = self._carried_out(job, runner)
            with self._changed:
                self._running.remove(job)
                if status == "queued":
                    with contextlib.suppress(HiresError):
                        job.status, job.attempts = "queued", job.attempts - 1
                        job.save()
                else:
                    self._end(job, status)
            self._tidy()

    def _taken(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            job = self._waiting.pop(0)
            self._running.append(job)
            job.status, job.started, job.attempts = "running", time.time(), job.attempts + 1
            with contextlib.suppress(HiresError):
                job.save()
            return job

    def _carried_out(self, job: Job, runner: Worker) -> str:
        """Make the pictures that are not there yet; what the job's status is then."""
        try:
            for index in range(len(job.made), len(job.tasks)):
                self._one(job, index, runner)
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
        return "done" if job.made or not job.tasks else "cancelled"

    def _one(self, job: Job, index: int, runner: Worker) -> None:
        task, job.skipping = job.tasks[index], False
        kind = _but_for_seed(task)
        if kind not in job.weights:  # of a job that an earlier server took
            job.weights[kind] = runner.weights(task, runner.plan(task, job.folder))
        job.meter.begin(index, job.weights[kind])

        def hear(event: Event) -> None:
            job.meter.hear(event)
            if job.stop:
                raise Cancelled(f"job {job.id} was stopped")
            if job.skipping:
                raise Skipped(f"picture {index} of job {job.id} was left out")

        try:
            made = runner.run(task, job.folder, f"result-{index}", hear)
        except Skipped:
            job.clear()
            return
        with self._lock:
            job.made.append(made)
        with contextlib.suppress(HiresError):
            job.save()

    def _end(self, job: Job, status: str) -> None:
        job.status, job.finished = status, time.time()
        job.clear()
        with contextlib.suppress(HiresError):
            job.save()
        if not job.ended.done():
            job.ended.set_result(None)

    def _tidy(self) -> None:
        """Forget the oldest ended jobs beyond what is kept, and those whose waiting client has been answered."""
        with self._lock:
            ended = sorted(
                (job for job in self._jobs.values() if job.status in ENDED and job.durable), key=lambda job: job.sequence
            )
            for job in ended[: max(0, len(ended) - self.settings.limits.kept)]:
                self.forget(job)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def _but_for_seed(task: Any) -> str:
    """What tells a task from others that differ in more than their seed."""
    text: str = task.model_copy(update={"seed": 0}).model_dump_json()
    return text
