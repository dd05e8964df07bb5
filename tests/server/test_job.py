"""`job.json`: what is written is read again, and a damaged file is set aside."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hires.devices.machines import described_card
from hires.server.bodies import RenderTask
from hires.server.job import Job, read
from hires.server.queue import JobQueue
from hires.server.settings import Library, Settings
from hires.server.worker import FinishedPicture
from hires.tiling.geometry import Size
from tests.support.still_worker import StillWorker

PICTURE = FinishedPicture(file="result-0.png", size=Size(32, 48), seed=3, seconds=0.5, sampler="euler", notes=("a note",))


def stored(folder: Path) -> Job:
    job = Job(
        id=folder.name,
        sequence=4,
        tasks=[RenderTask(prompt="a lake", size="48x32", seed=3, model="demo")],
        folder=folder,
        status="done",
        started=2.0,
        finished=3.0,
        attempts=1,
        pictures=[PICTURE],
        request_digest="d",
    )
    job.save()
    return job


def changed(**values: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | values)


def picture(**values: object) -> Callable[[str], str]:
    def change(text: str) -> str:
        document = json.loads(text)
        document["made"][0] |= values
        return json.dumps(document)

    return change


DAMAGE: dict[str, Callable[[str], Any]] = {
    "nesting": lambda text: "[" * 200_000,
    "nesting within": lambda text: text.replace('"d"', "[" * 200_000 + "]" * 200_000),
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "no UTF-8": lambda text: b"\xff" + text.encode(),
    "sequence Infinity": changed(sequence=float("inf")),
    "sequence 1e30": changed(sequence=1e30),
    "sequence of 5000 digits": lambda text: re.sub('"sequence": ?4', f'"sequence": {"9" * 5000}', text),
    "attempts -Infinity": changed(attempts=float("-inf")),
    "created NaN": changed(created=float("nan")),
    "created 1e300": changed(created=1e300),
    "started text": changed(started="yesterday"),
    "status": changed(status="superb"),
    "error of a number": changed(error=3),
    "tasks null": changed(tasks=None),
    "tasks of texts": changed(tasks=["a"]),
    "no tasks": changed(tasks=[]),
    "made": changed(made={"file": "result-0.png"}),
    "size 1e30": picture(size=[1e30, 1e30]),
    "size of text": picture(size=["a", "b"]),
    "seconds of text": picture(seconds="long"),
    "file outside": picture(file="../../secret.png"),
}


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    job = stored(tmp_path / "one-job-here")
    job.error = "a path that is no text: \udcff"
    job.save()
    again = read(job.folder)
    assert again is not None and again.ended.done()
    for name in (
        "id",
        "sequence",
        "tasks",
        "status",
        "created",
        "started",
        "finished",
        "attempts",
        "pictures",
        "request_digest",
    ):
        assert getattr(again, name) == getattr(job, name), name


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_set_aside_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    job = stored(tmp_path / "one-job-here")
    file = job.folder / "job.json"
    damaged = DAMAGE[kind](file.read_text())
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    content = file.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert read(job.folder) is None
    aside = job.folder / "job.json.damaged"
    assert not file.exists() and aside.read_bytes() == content, "nothing is lost"
    assert str(aside) in caplog.text


def test_a_server_starts_beside_damaged_jobs(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path, devices=("cpu",))
    whole = stored(tmp_path / "jobs" / "a-whole-job")
    for index, kind in enumerate(DAMAGE):
        file = stored(tmp_path / "jobs" / f"damaged-{index}").folder / "job.json"
        damaged = DAMAGE[kind](file.read_text())
        file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    library = Library(settings)
    queue = JobQueue(settings, library, [StillWorker(settings, library, described_card(10**9))])
    queue.start()
    try:
        assert [document["id"] for document in queue.documents()] == [whole.id]
    finally:
        queue.close()
