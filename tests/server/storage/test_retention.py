"""What finished jobs and saved outputs may hold, and who can read it."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from hires.cli.serve import ServeOptions
from hires.devices.machines import described_card
from hires.server.bodies import RenderTask
from hires.server.job import Job
from hires.server.queue import JobQueue
from hires.server.settings import Library, Limits, Settings
from hires.server.storage.retention import Kept, over
from tests.support.server import Live
from tests.support.still_worker import StillWorker


def ended(folder: Path, name: str, at: float, size: int) -> None:
    """A finished job whose picture has so many bytes."""
    job = Job(
        id=name, sequence=int(at), tasks=[RenderTask(prompt="a", size="64x64", model="demo")], folder=folder / "jobs" / name
    )
    job.status, job.created, job.finished = "done", at, at
    job.save()
    (job.folder / "result-0.png").write_bytes(bytes(size))


def saved(folder: Path, name: str, at: float, size: int) -> None:
    file = folder / "outputs" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(bytes(size))
    os.utime(file, (at, at))


def left(folder: Path) -> set[str]:
    return {path.name for place in ("jobs", "outputs") for path in (folder / place).iterdir()}


def queue_of(folder: Path, limits: Limits) -> JobQueue:
    settings = Settings(folder=folder, devices=("cpu",), limits=limits)
    library = Library(settings)
    return JobQueue(settings, library, [StillWorker(settings, library, described_card(10**9))])


def test_the_oldest_jobs_and_saved_outputs_go_first(tmp_path: Path) -> None:
    for number in (1, 3, 5):
        ended(tmp_path, f"job-number-{number}", number, 100_000)
    for number in (2, 4):
        saved(tmp_path, f"20260101-000000-000{number}-7.png", number, 100_000)
    saved(tmp_path, "of-the-user.png", 0, 100_000)
    everything = left(tmp_path)
    unbounded = queue_of(tmp_path, Limits())
    unbounded.start()
    unbounded.close()
    assert left(tmp_path) == everything
    queue = queue_of(tmp_path, Limits(kept_bytes=310_000))
    queue.start()
    try:
        assert left(tmp_path) == everything - {"job-number-1", "20260101-000000-0002-7.png"}
        assert queue.get("job-number-1") is None and queue.get("job-number-3") is not None
        queue.settings = replace(queue.settings, limits=Limits(kept_bytes=0))
        queue.make_room()
        assert left(tmp_path) == {"job-number-5", "of-the-user.png"}, "the latest stays"
    finally:
        queue.close()


def test_a_finished_job_makes_room_for_itself(tmp_path: Path) -> None:
    ended(tmp_path, "an-older-job", 1, 100_000)
    (tmp_path / "outputs").mkdir()
    queue = queue_of(tmp_path, Limits(kept_bytes=100_000))
    queue.start()
    [worker] = queue.workers
    assert isinstance(worker, StillWorker)
    worker.go.set()
    try:
        assert left(tmp_path) == {"an-older-job"}, "alone it stays"
        job = queue.submit([RenderTask(prompt="a", size="64x64")])
        end = time.monotonic() + 20
        while left(tmp_path) != {job.id}:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        queue.close()


def test_no_more_goes_than_has_to() -> None:
    kept = [Kept(at, 10, lambda: None) for at in (3.0, 1.0, 2.0)]
    assert [[each.since for each in over(kept, most)] for most in (30, 29, 20, 19, 0)] == [
        [],
        [1.0],
        [1.0],
        [1.0, 2.0],
        [1.0, 2.0],
    ]
    assert over([], 0) == []


def test_the_option_is_an_amount() -> None:
    assert ServeOptions(keep_bytes="2GB").settings().limits.kept_bytes == 2 * 10**9
    assert ServeOptions().settings().limits.kept_bytes is None


def test_folders_that_others_could_read_are_closed_at_the_start(tmp_path: Path) -> None:
    ended(tmp_path, "an-older-job", 1, 10)
    (tmp_path / "jobs").chmod(0o755)
    queue = queue_of(tmp_path, Limits())
    queue.start()
    try:
        assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700
        job = queue.submit([RenderTask(prompt="a", size="64x64")])
        assert job.folder.stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "incoming").stat().st_mode & 0o777 == 0o700
    finally:
        [worker] = queue.workers
        assert isinstance(worker, StillWorker)
        worker.go.set()
        queue.close()


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_what_a_server_writes_only_its_user_can_read(server: Live) -> None:
    job = httpx.post(f"{server.url}/jobs", json={"kind": "render", "prompt": "a", "size": "64x64", "steps": 1}).json()
    end = time.monotonic() + 60
    while httpx.get(f"{server.url}/jobs/{job['id']}").json()["status"] != "done":
        assert time.monotonic() < end
        time.sleep(0.02)
    folder = server.folder / "jobs" / job["id"]
    assert {path.stat().st_mode & 0o777 for path in (server.folder, folder.parent, folder)} == {0o700}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 2 and {path.stat().st_mode & 0o777 for path in files} == {0o600}
