"""32 clients at once across `kill -9`: every job answered once, in order, none lost; an unfinished picture goes on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

import hires
from hires.errors import RunError
from tests.support.server import Live


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hires.client.connection.RETRIES", 200)
    monkeypatch.setattr("hires.client.connection.PAUSE_SECONDS", 0.02)


@pytest.mark.parametrize(("clients", "kills"), [(6, 1), pytest.param(32, 4, marks=pytest.mark.slow)])
def test_every_job_is_answered_once_and_in_order(tmp_path: Path, clients: int, kills: int) -> None:
    first = Live(tmp_path / "jobs")
    port = first.port
    answered: dict[int, dict[str, object]] = {}
    lock = threading.Lock()

    def call(number: int) -> None:
        with hires.Client(f"http://127.0.0.1:{port}") as client:
            job = client.submit(prompt=f"a lake {number}", size="48x32", steps=2, seed=number)
            found = job.wait()
            image = job.image()
        with lock:
            assert number not in answered
            answered[number] = found | {"pixels": np.asarray(image)}

    with ThreadPoolExecutor(clients) as pool:
        calls = [pool.submit(call, number) for number in range(clients)]
        for kill in range(kills):
            while len(answered) < (kill + 1) * clients // (kills + 2):
                time.sleep(0.02)
            first.kill()
            first = Live(tmp_path / "jobs", "--port", str(port))
        for found in calls:
            found.result(240)
    assert sorted(answered) == list(range(clients))
    listed = httpx.get(f"http://127.0.0.1:{port}/jobs").json()
    assert len(listed) == clients and {job["status"] for job in listed} == {"done"}
    finished = [job["finished"] for job in reversed(listed)]
    assert finished == sorted(finished), "in the order they were queued"
    for number in (0, clients // 2, clients - 1):
        here = hires.render(f"a lake {number}", size="48x32", steps=2, seed=number, vram="2GB")
        assert np.array_equal(answered[number]["pixels"], here.pixels)
    first.stop()


def test_an_unfinished_picture_goes_on_where_it_was(tmp_path: Path) -> None:
    wanted = {"prompt": "a lake", "size": "288x192", "steps": 10, "seed": 4, "strategy": "tiled"}
    live = Live(tmp_path / "jobs")
    job = hires.Client(live.url).submit(**wanted)
    folder = tmp_path / "jobs" / "jobs" / job.id
    while job.status()["progress"]["fraction"] < 0.4:
        time.sleep(0.01)
    live.stop()  # a polite end writes the journal down; kill -9 at any moment is the engine's own test
    assert json.loads((folder / "job.json").read_text())["status"] == "queued"
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*-estimate-*")}
    assert len(written) >= 4, "what it has evaluated is there"
    again = Live(tmp_path / "jobs")
    client = hires.Client(again.url)
    found = client.job(job.id)
    while found.status()["status"] != "done":
        for file, at in written.items():
            with contextlib.suppress(FileNotFoundError):  # the picture is there, and the journal gone
                assert file.stat().st_mtime_ns == at, "what was done is read and not done again"
        time.sleep(0.005)
    prompt = wanted.pop("prompt")
    assert np.array_equal(np.asarray(found.image()), hires.render(prompt, vram="2GB", **wanted).pixels)
    again.stop()


@pytest.mark.slow
def test_a_job_that_stops_the_server_again_and_again_is_given_up(tmp_path: Path) -> None:
    live = Live(tmp_path / "jobs")
    job = hires.Client(live.url).submit(prompt="a lake", size="1024x1024", steps=300)
    for _ in range(3):
        client = hires.Client(live.url)
        while client.job(job.id).status()["status"] != "running":
            time.sleep(0.02)
        live.kill()
        live = Live(tmp_path / "jobs")
    with pytest.raises(RunError, match="stopped 3 times"):
        hires.Client(live.url).job(job.id).wait()
    assert hires.Client(live.url).render("a lake", size="32x32", steps=1).size == (32, 32)
    live.stop()


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    live = Live(tmp_path / "jobs", bare=True)
    with pytest.raises(AssertionError, match="another server works there"):
        Live(tmp_path / "jobs")
    live.stop()


def test_a_full_queue_refuses_and_takes_jobs_again(tmp_path: Path) -> None:
    live = Live(tmp_path / "jobs", "--queue", "2")
    client = hires.Client(live.url)
    running = client.submit(prompt="a lake", size="1024x1024", steps=300)
    while running.status()["status"] != "running":
        time.sleep(0.02)
    waiting = [client.submit(prompt="a lake", size="32x32", steps=1) for _ in range(2)]
    answer = client.http.post("/jobs", json={"kind": "render", "prompt": "a", "size": "32x32"})
    assert answer.status_code == 429 and "2 jobs wait" in answer.json()["detail"]
    assert httpx.post(f"{live.url}/sdapi/v1/txt2img", json={"prompt": "a"}).status_code == 429
    running.cancel()
    for job in waiting:
        job.wait()
    client.submit(prompt="a lake", size="32x32", steps=1).wait()
    live.stop()
