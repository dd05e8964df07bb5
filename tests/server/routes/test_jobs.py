"""`/jobs` over HTTP and `hires.Client`: queue, watch, fetch in parts, cancel, and the limits."""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import hires
from hires.errors import Cancelled, OutputError, RequestError, RunError
from hires.events import Event
from tests.support.server import Live

SMALL = {"size": "96x64", "steps": 2, "seed": 5}
LONG = {"size": "1024x1024", "steps": 200, "seed": 1}


def encoded(pixels: np.ndarray) -> str:
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, format="PNG")
    return base64.b64encode(into.getvalue()).decode()


def test_the_client_renders_what_the_engine_renders(server: Live, tmp_path: Path) -> None:
    events: list[Event] = []
    with hires.Client(server.url) as client:
        path = client.render("a lake", output=tmp_path / "a.png", on_event=events.append, **SMALL)
    here = hires.render("a lake", vram="2GB", **SMALL)
    assert np.array_equal(np.asarray(Image.open(path)), here.pixels)
    assert events[-1].stage == "done"
    with pytest.raises(OutputError, match="there already"):
        hires.Client(server.url).render("a lake", output=tmp_path / "a.png", **SMALL)


def test_progress_rises_to_one_with_previews_that_can_be_read(server: Live) -> None:
    client = hires.Client(server.url)
    job = client.submit(prompt="a lake", size="320x256", steps=4, seed=3, count=2)
    fractions, previews = [], []
    for found in job.events():
        fractions.append(found["progress"]["fraction"])
        answer = client.http.get(f"/jobs/{job.id}/preview")
        if answer.status_code == 200:
            previews.append(np.asarray(Image.open(io.BytesIO(answer.content))))
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert len({f for f in fractions if 0 < f < 1}) >= 4, fractions
    assert previews and previews[0].shape[2] == 3 and previews[-1].std() > 5
    assert [result["seed"] for result in job.status()["results"]] == [3, 4]
    assert job.image(1).size == (320, 256)


def test_ranges_of_the_result(server: Live) -> None:
    client = hires.Client(server.url)
    job = client.submit(prompt="a lake", **SMALL)
    result = job.wait()["results"][0]
    whole = client.http.get(result["url"]).content
    assert len(whole) == result["bytes"] and whole.startswith(b"\x89PNG")
    part = client.http.get(result["url"], headers={"Range": "bytes=100-299"})
    assert part.status_code == 206 and part.content == whole[100:300]
    assert client.http.get(result["url"], headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


def test_a_broken_transfer_goes_on_where_it_was(server: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = hires.Client(server.url)
    job = client.submit(prompt="a lake", **SMALL)
    job.wait()
    asked: list[str | None] = []
    iterate = httpx.Response.iter_bytes

    def breaking(answer: object, size: int | None = None) -> object:
        asked.append(answer.request.headers.get("Range"))
        for index, part in enumerate(iterate(answer, 700)):
            if index == 1 and len(asked) < 3:
                raise httpx.ReadError("cable")
            yield part

    monkeypatch.setattr(httpx.Response, "iter_bytes", breaking)
    monkeypatch.setattr("hires.client.connection.PAUSE_SECONDS", 0)
    path = job.save(tmp_path / "a.png")
    assert asked == [None, "bytes=700-", "bytes=1400-"]
    assert path.read_bytes() == b"".join(iterate(client.http.get(f"/jobs/{job.id}/result")))
    assert list(tmp_path.iterdir()) == [path]


def test_cancel_answers_at_once_and_frees_the_device(server: Live) -> None:
    client = hires.Client(server.url)
    job = client.submit(prompt="a lake", **LONG)
    for found in job.events():
        if found["progress"]["fraction"] > 0:
            break
    next_job = client.submit(prompt="a lake", **SMALL)
    assert next_job.status()["position"] == 0
    begun = time.monotonic()
    job.cancel()
    answered = time.monotonic() - begun
    while job.status()["status"] != "cancelled":
        time.sleep(0.02)
    freed = time.monotonic() - begun
    assert answered < 1 and freed < 2, (answered, freed)
    next_job.wait()
    assert not [p for p in (server.folder / "jobs" / job.id).iterdir() if p.name != "job.json"], "what was unfinished is gone"
    with pytest.raises(Cancelled):
        job.wait()
    waiting = [client.submit(prompt="a lake", **LONG) for _ in range(2)]
    waiting[1].cancel()
    assert waiting[1].status()["status"] == "cancelled"
    waiting[0].cancel()


def test_the_same_id_is_one_job(server: Live) -> None:
    client = hires.Client(server.url)
    first = client.submit(prompt="a lake", id="one-and-the-same", **SMALL)
    again = client.submit(prompt="a lake", id="one-and-the-same", **SMALL)
    assert first.id == again.id == "one-and-the-same"
    with pytest.raises(RequestError, match="another job's"):
        client.submit(prompt="a river", id="one-and-the-same", **SMALL)
    first.wait()


def test_pictures_to_start_from_masks_and_enlargements(server: Live) -> None:
    client = hires.Client(server.url)
    given = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 48:] = 255
    drawn = np.asarray(client.render("a lake", init=given, mask=mask, strength=0.8, **SMALL))
    assert np.array_equal(drawn[:, :48], given[:, :48]) and (drawn[:, 48:] != given[:, 48:]).mean() > 0.9
    large = client.upscale(given, scale=2.5)
    here = hires.upscale(given, scale=2.5).pixels
    assert large.size == (240, 160) and np.array_equal(np.asarray(large), here)
    refined = client.upscale(given, size=(128, 96), refine=True, strength=0.5, prompt="a lake", steps=3, seed=1)
    assert refined.size == (128, 96)


def test_plan_of_a_job_without_running_it(server: Live) -> None:
    client = hires.Client(server.url)
    found = client.plan(prompt="a lake", size="2048x1536")
    assert (
        "2048x1536" in found["text"]
        and found["svg"].startswith("<svg")
        and found["plan"]["output"] == {"height": 1536, "width": 2048}
    )
    assert found["plan"]["device"].startswith("CPU"), "of this machine, though the server has a budget"
    with pytest.raises(RequestError, match=r"budget|needs"):
        client.plan(prompt="a lake", size="16384x16384", vram="1MB")
    with pytest.raises(RequestError, match="this server has 2GB"):
        client.plan(prompt="a lake", size="1024x1024", vram="64GB")


def test_what_does_not_fit_is_refused_before_it_is_queued(server: Live) -> None:
    client = hires.Client(server.url)
    before = len(client.jobs())
    for fields, reason in (
        ({"size": "8x8"}, "at least"),
        ({"size": "96x64", "model": "../../etc/passwd"}, "unknown model"),
        ({"size": "96x64", "loras": ["/etc/passwd"]}, "unknown LoRA"),
        ({"size": "96x64", "format": "webp", "bits": 16}, "WebP"),
        ({"size": "70000x64"}, "limit"),
        ({"size": "96x64", "strength": 0.5}, "init"),
        ({"size": "96x64", "mask": np.zeros((4, 4, 3), np.uint8)}, "init"),
        ({"size": "96x64", "sampler": "eulr"}, "did you mean"),
        ({}, "no size"),
    ):
        with pytest.raises(RequestError, match=reason):
            client.submit(prompt="a lake", **fields)
    assert len(client.jobs()) == before
    assert {path.name for path in (server.folder / "jobs").iterdir()} >= {job["id"] for job in client.jobs()}


def test_events_are_a_stream_of_server_sent_events(server: Live) -> None:
    client = hires.Client(server.url)
    job = client.submit(prompt="a lake", **SMALL)
    with client.http.stream("GET", f"/jobs/{job.id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    parts = [part.split("\n") for part in text.strip().split("\n\n")]
    assert all(part[0].startswith("event: ") and part[1].startswith("data: ") for part in parts)
    assert parts[-1][0] == "event: end" and json.loads(parts[-1][1][6:])["status"] == "done"


def test_jobs_that_are_not_there_and_results_that_are_not_finished(server: Live) -> None:
    client = hires.Client(server.url)
    assert client.http.get("/jobs/nothing-here").status_code == 404
    job = client.submit(prompt="a lake", **LONG)
    assert client.http.get(f"/jobs/{job.id}/result").status_code == 409
    assert client.http.delete(f"/jobs/{job.id}").status_code == 409
    job.cancel()
    while job.status()["status"] != "cancelled":
        time.sleep(0.05)
    assert client.http.get(f"/jobs/{job.id}/result").status_code == 404
    assert client.http.delete(f"/jobs/{job.id}").status_code == 204
    assert client.http.get(f"/jobs/{job.id}").status_code == 404
    assert not (server.folder / "jobs" / job.id).exists()


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hires.client.connection.PAUSE_SECONDS", 0)
    with pytest.raises(RunError, match="is `hires serve` running there"):
        hires.Client("http://127.0.0.1:9").models()
    with pytest.raises(RequestError, match="give one such as"):
        hires.Client("127.0.0.1:7860")
