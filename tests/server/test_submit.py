"""Requests that overlap under one id, and what a killed server left while pictures were being taken in."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hires.devices.machines import described_card
from hires.errors import RequestError
from hires.server.bodies import AnyTask, RenderTask
from hires.server.errors import ConflictError
from hires.server.job import Job
from hires.server.queue import JobQueue
from hires.server.settings import Library, Settings
from tests.support.still_worker import StillWorker

KEY = "one-and-the-same"


def opened(folder: Path) -> JobQueue:
    settings = Settings(folder=folder, devices=("cpu",))
    library = Library(settings)
    return JobQueue(settings, library, [StillWorker(settings, library, described_card(10**9))])


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """It takes jobs in and runs none."""
    queue = opened(tmp_path)
    yield queue
    queue.close()


def task(prompt: str) -> RenderTask:
    return RenderTask(prompt=prompt, size="64x64", seed=1)


class Pictures:
    """Takes in pictures slowly: a file with the prompt, after which an invalid one is refused."""

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds
        self.begun: list[str] = []

    def __call__(self, task: AnyTask, folder: Path, index: int) -> AnyTask:
        self.begun.append(task.prompt)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "input-0-init.png").write_text(task.prompt)
        time.sleep(self.seconds)
        if task.prompt == "invalid":
            raise RequestError("init: cannot be read")
        assert (folder / "input-0-init.png").read_text() == task.prompt, "another request's picture lies there"
        return task


def together(calls: list[Callable[[], Job]]) -> list[Job | Exception]:
    """What calls that begin at once return or raise."""
    barrier = threading.Barrier(len(calls))

    def call(each: Callable[[], Job]) -> Job | Exception:
        barrier.wait()
        try:
            return each()
        except RequestError as error:
            return error
        except ConflictError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_requests_of_one_id_and_body_that_overlap_get_one_job(queue: JobQueue) -> None:
    take_in = Pictures()
    answers = together([lambda: queue.submit([task("a lake")], id=KEY, prepare=take_in)] * 6)
    assert all(answer is answers[0] for answer in answers) and isinstance(answers[0], Job)
    assert take_in.begun == ["a lake"], "taken in once"
    assert queue.count() == 1 and (answers[0].folder / "input-0-init.png").read_text() == "a lake"


def test_of_two_bodies_under_one_id_one_gets_the_job_and_the_other_409(queue: JobQueue) -> None:
    take_in = Pictures()
    bodies = ["a lake", "a river"] * 3
    answers = together([lambda prompt=prompt: queue.submit([task(prompt)], id=KEY, prepare=take_in) for prompt in bodies])
    jobs = {answer.id: answer for answer in answers if isinstance(answer, Job)}
    assert list(jobs) == [KEY] and queue.count() == 1
    chosen = jobs[KEY].tasks[0].prompt
    for prompt, answer in zip(bodies, answers, strict=True):
        assert isinstance(answer, Job if prompt == chosen else ConflictError)
    assert (jobs[KEY].folder / "input-0-init.png").read_text() == chosen


def test_an_invalid_body_does_not_disturb_a_valid_one_of_the_same_id(queue: JobQueue) -> None:
    take_in = Pictures()
    bodies = ["invalid", "a lake"] * 3
    answers = together([lambda prompt=prompt: queue.submit([task(prompt)], id=KEY, prepare=take_in) for prompt in bodies])
    for prompt, answer in zip(bodies, answers, strict=True):
        assert isinstance(answer, Job) if prompt == "a lake" else isinstance(answer, RequestError | ConflictError)
    [job] = {answer.id: answer for answer in answers if isinstance(answer, Job)}.values()
    assert (job.folder / "input-0-init.png").read_text() == "a lake"
    assert [path.name for path in queue.folder.iterdir()] == [KEY]


def test_a_damaged_jobs_folder_is_not_taken_for_another(queue: JobQueue) -> None:
    folder = queue.folder / KEY
    folder.mkdir(parents=True)
    (folder / "job.json.damaged").write_text("{")
    with pytest.raises(ConflictError, match=r"job\.json\.damaged"):
        queue.submit([task("a lake")], id=KEY)
    assert [path.name for path in folder.iterdir()] == ["job.json.damaged"] and queue.count() == 0


def test_what_a_killed_server_was_taking_in_is_cleared_at_the_next_start(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:

        def die(task: AnyTask, folder: Path, index: int) -> AnyTask:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "input-0-init.png").write_bytes(bytes(100))
            os._exit(9)

        opened(tmp_path).submit([task("a lake")], prepare=die)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [*tmp_path.rglob("input-0-init.png")]
    (tmp_path / "incoming" / "tmp0aZ_9x12").mkdir(parents=True)  # of an A1111 call
    (tmp_path / "incoming" / "tmp0aZ_9x12" / "init-0.png").write_bytes(bytes(100))
    before = tmp_path / "jobs" / ("0" * 32)  # of an earlier version
    before.mkdir(parents=True)
    (before / "input-0-picture.png").write_bytes(bytes(100))
    for kept in ("jobs/of the user", "incoming/of the user"):
        (tmp_path / kept).mkdir(parents=True)
        (tmp_path / kept / "init.png").write_bytes(b"a picture")
    queue = opened(tmp_path)
    queue.start()
    queue.close()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")} == {
        "jobs/of the user/init.png",
        "incoming/of the user/init.png",
    }
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["of the user"]
