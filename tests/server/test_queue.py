"""The order in which a queue's jobs run, and on which of its devices: with workers that draw nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from hires.devices.machines import described_card
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError, ModelError, RequestError
from hires.server.bodies import RenderTask, UpscaleTask
from hires.server.job import Job
from hires.server.queue import JobQueue
from hires.server.settings import Library, Settings
from tests.support.still_worker import StillWorker

MB = 10**6
CARD = replace(described_card(1000 * MB), name="large card")
SMALL_CARD = replace(described_card(60 * MB), name="small card")
SMALL, LARGE, TOO_LARGE = "64x64", "4096x4096", "32768x32768"


@pytest.fixture
def queues(tmp_path: Path, eps_folder: Path) -> Iterator[Queues]:
    opened = Queues(tmp_path, eps_folder)
    yield opened
    opened.close()


class Queues:
    """Queues over one folder, one after the other. They offer 'demo', the default, and 'other'."""

    def __init__(self, folder: Path, other: Path) -> None:
        (folder / "models").mkdir()
        (folder / "models" / "other").symlink_to(other)
        self.settings = Settings(folder=folder, models=folder / "models", devices=("cpu",))
        self.opened: list[JobQueue] = []

    def open(self, *devices: DeviceSpec, start: bool = True) -> tuple[JobQueue, list[StillWorker]]:
        library = Library(self.settings)
        workers = [StillWorker(self.settings, library, device) for device in devices]
        queue = JobQueue(self.settings, library, workers)
        self.opened.append(queue)
        if start:
            queue.start()
        return queue, workers

    def close(self) -> None:
        for queue in self.opened:
            for worker in queue.workers:
                assert isinstance(worker, StillWorker)
                worker.go.set()
            queue.close()


def render(prompt: str, size: str = SMALL, **options: object) -> RenderTask:
    return RenderTask(prompt=prompt, size=size, **options)


def busy(queue: JobQueue, worker: StillWorker) -> Job:
    """A job whose picture waits until `worker.go` is set."""
    job = queue.submit([render("first")])
    assert worker.begun.wait(60)
    return job


def finish(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.ended.result(60)


def test_the_loaded_model_first_then_short_before_long(queues: Queues) -> None:
    queue, [worker] = queues.open(CARD)
    first = busy(queue, worker)
    jobs = [
        queue.submit([render("other, long", LARGE, model="other")]),
        queue.submit([render("loaded, long", LARGE)]),
        queue.submit([render("other, short", model="other")]),
        queue.submit([render("loaded, short")]),
        queue.submit([render("other, short, later", model="other")]),
    ]
    assert [queue.describe(job)["position"] for job in jobs] == [0, 1, 2, 3, 4], "by arrival"
    worker.go.set()
    finish([first, *jobs])
    assert worker.drawn == [
        "first",
        "loaded, short",
        "loaded, long",
        "other, short",
        "other, short, later",
        "other, long",
    ]


def test_a_job_that_waited_a_minute_goes_first(queues: Queues) -> None:
    queue, [worker] = queues.open(CARD)
    first = busy(queue, worker)
    jobs = [queue.submit([render("other, long", LARGE, model="other")]), queue.submit([render("loaded, short")])]
    jobs[0].created -= 61
    worker.go.set()
    finish([first, *jobs])
    assert worker.drawn == ["first", "other, long", "loaded, short"]


def test_what_is_left_of_a_job_is_what_it_is_planned_to_take(queues: Queues) -> None:
    queue, [worker] = queues.open(CARD, start=False)
    job = queue.submit([render(f"{index}") for index in range(4)])
    waiting = job.as_waiting(worker, job.created + 3)
    assert waiting.waited_seconds == pytest.approx(3)
    job.pictures = [worker_picture(worker)] * 3
    assert job.as_waiting(worker, job.created).planned_seconds == pytest.approx(waiting.planned_seconds / 4)


def worker_picture(worker: StillWorker) -> object:
    worker.go.set()
    return worker.run(render("made"), Path(), "result", lambda event: None)


def test_a_worker_takes_only_what_fits_its_device(queues: Queues) -> None:
    queue, [small, large] = queues.open(SMALL_CARD, CARD)
    large.go.set()
    finish([queue.submit([render(f"large {index}", LARGE)]) for index in range(3)])
    assert large.drawn == ["large 0", "large 1", "large 2"] and small.drawn == [], "though it was free"
    both = [queue.submit([render(f"small {index}")]) for index in range(6)]
    assert small.begun.wait(60), "what fits both runs on either"
    small.go.set()
    finish(both)
    assert sorted(large.drawn[3:] + small.drawn) == [f"small {index}" for index in range(6)]


def test_what_fits_nowhere_is_refused_with_the_error_of_the_largest(queues: Queues) -> None:
    for devices in ((SMALL_CARD, CARD), (CARD, SMALL_CARD)):
        queue, _ = queues.open(*devices, start=False)
        with pytest.raises(BudgetError) as refused:
            queue.submit([render("too large", TOO_LARGE)])
        with pytest.raises(BudgetError) as alone:
            queues.open(CARD, start=False)[0].submit([render("too large", TOO_LARGE)])
        assert str(refused.value) == str(alone.value)
        assert queue.count() == 0 and not [*(queue.folder).glob("*")]
        with pytest.raises(ModelError, match="unknown model 'nobody'"):
            queue.submit([render("a", model="nobody")])


def test_the_plan_is_of_the_first_device_that_it_fits(queues: Queues) -> None:
    queue, _ = queues.open(SMALL_CARD, CARD, start=False)
    small, large = (queue.plan(render("a", size), queue.folder) for size in (SMALL, LARGE))
    assert small is not None and small.device == "small card"
    assert large is not None and large.device == "large card"


def test_equal_cards_are_planned_for_once(queues: Queues) -> None:
    queue, workers = queues.open(CARD, SMALL_CARD, CARD, start=False)
    job = queue.submit([render("a", seed=index) for index in range(3)])
    assert [worker.estimated for worker in workers] == [["a"], ["a"], []]
    assert job.fits(workers[0]) and job.fits(workers[1])


def test_an_enlargement_without_a_model_fits_everywhere_and_loads_nothing(queues: Queues) -> None:
    queue, [small] = queues.open(replace(SMALL_CARD, budget_bytes=MB), start=False)

    def picture(task: UpscaleTask, folder: Path, index: int) -> UpscaleTask:
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "in.png")
        return task

    job = queue.submit([UpscaleTask(picture="in.png", scale=2)], prepare=picture)
    assert job.fits(small) and job.as_waiting(small, job.created).model is None
    with pytest.raises(BudgetError):
        queue.submit([render("a")])


def test_restored_jobs_are_planned_when_they_are_looked_at_and_wait_since_they_came(queues: Queues) -> None:
    before, _ = queues.open(CARD, start=False)
    names = [before.submit([render(f"{index}", LARGE if index == 0 else SMALL)]).id for index in range(12)]
    for index, name in enumerate(names):
        job = before.get(name)
        assert job is not None
        job.created -= 100 - index
        job.save()
    queue, [worker] = queues.open(CARD)
    assert worker.begun.wait(60)
    assert worker.drawn == ["0"], "it waited for more than a minute, long as it is"
    assert worker.estimated == [f"{index}" for index in range(8)], "no more than are looked at"
    worker.go.set()
    restored = [queue.get(name) for name in names]
    finish([job for job in restored if job is not None])
    assert worker.drawn == [f"{index}" for index in range(12)]
    assert worker.estimated == worker.drawn, "each once"


def test_a_restored_job_that_fits_no_more_fails_with_its_error_and_the_next_one_runs(queues: Queues) -> None:
    before, _ = queues.open(CARD, start=False)
    large, small, gone = (before.submit([task]) for task in (render("a", LARGE), render("b"), render("c", model="other")))
    (queues.settings.folder / "models" / "other").unlink()
    queue, [worker] = queues.open(SMALL_CARD)
    worker.go.set()
    restored = {job.id: queue.get(job.id) for job in (large, small, gone)}
    finish([job for job in restored.values() if job is not None])
    failed, done, unknown = (restored[job.id] for job in (large, small, gone))
    assert failed is not None and failed.status == "failed" and "budget" in str(failed.error) and failed.error_status == 400
    assert unknown is not None and unknown.status == "failed" and "unknown model 'other'" in str(unknown.error)
    assert done is not None and done.status == "done" and worker.drawn == ["b"]


def test_a_defect_in_a_restored_jobs_plan_ends_that_job_alone(queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = queues.open(CARD, start=False)
    names = [before.submit([render(prompt)]).id for prompt in ("broken", "whole")]
    real = StillWorker.estimate

    def estimate(worker: StillWorker, task: RenderTask, folder: Path) -> object:
        if task.prompt == "broken":
            raise ZeroDivisionError("a defect")
        return real(worker, task, folder)

    monkeypatch.setattr(StillWorker, "estimate", estimate)
    queue, [worker] = queues.open(CARD)
    worker.go.set()
    broken, whole = (queue.get(name) for name in names)
    assert broken is not None and whole is not None
    finish([broken, whole])
    assert broken.status == "failed" and "ZeroDivisionError: a defect" in str(broken.error)
    assert whole.status == "done"


def test_a_cancelled_job_is_passed(queues: Queues) -> None:
    queue, [worker] = queues.open(CARD)
    first = busy(queue, worker)
    second, third = queue.submit([render("second")]), queue.submit([render("third")])
    queue.cancel(second)
    worker.go.set()
    finish([first, second, third])
    assert second.status == "cancelled" and worker.drawn == ["first", "third"]


def test_a_job_keeps_the_default_model_of_when_it_was_queued(queues: Queues) -> None:
    queue, _ = queues.open(CARD, start=False)
    before = queue.submit([render("before")], id="the-same-request")
    queue.library.switch_model("other")
    after = queue.submit([render("after")])
    assert (before.tasks[0].model, after.tasks[0].model) == ("demo", "other")
    assert queue.submit([render("before")], id="the-same-request") is before, "the request is the same"
    again, [worker] = queues.open(CARD, start=False)
    again.start()
    assert again.library.default_model().name == "demo", "a switch ends with the server"
    restored = again.get(after.id)
    assert restored is not None and restored.tasks[0].model == "other"
    worker.go.set()


def test_a_switch_to_what_cannot_be_used_changes_nothing(queues: Queues) -> None:
    library = queues.open(CARD, start=False)[0].library
    broken = queues.settings.folder / "models" / "broken.safetensors"
    broken.write_bytes(b"no weights")
    for name, reason in (("nobody", r"unknown model 'nobody': .*known: broken, demo, other"), ("broken", "broken")):
        with pytest.raises(RequestError, match=reason):
            library.switch_model(name)
        assert library.default_model().name == "demo"
    library.switch_model("other")
    assert library.model(None) == library.model("other") and library.models()[0].name == "other"
    assert library.model("demo") == "demo"


def test_a_default_whose_file_is_gone_is_told_and_another_can_be_chosen(queues: Queues) -> None:
    queue, _ = queues.open(CARD, start=False)
    queue.library.switch_model("other")
    (queues.settings.folder / "models" / "other").unlink()
    with pytest.raises(ModelError, match="unknown model 'other': known: demo"):
        queue.submit([render("a")])
    assert queue.submit([render("a", model="demo")]).status == "queued"
    queue.library.switch_model("demo")
    assert queue.submit([render("a")]).tasks[0].model == "demo"


def test_a_worker_that_just_loaded_a_model_keeps_it_for_the_whole_idle_time(
    queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it began to load when the time was nearly over, and was at it when it was over."""
    queues.settings = replace(queues.settings, idle_unload_seconds=1.5)
    _, [worker] = queues.open(CARD)
    unloads: list[float] = []
    monkeypatch.setattr(worker.models, "unload", lambda: unloads.append(time.monotonic()))
    with worker._work():
        time.sleep(2.0)
        loaded = time.monotonic()
    while not any(at > loaded for at in unloads):
        time.sleep(0.02)
    assert min(at for at in unloads if at > loaded) - loaded >= 1.4
