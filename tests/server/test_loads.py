"""What a server loads, and when: models once, after a switch, a reload and an unload; and how soon a picture begins."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

import hires
from hires.models.text_encoders import TextEncoders
from hires.pipelines import load as loading
from hires.server.app import create_app
from hires.server.bodies import RenderTask, UpscaleTask
from hires.server.queue import JobQueue
from hires.server.settings import Library, Settings
from hires.server.worker import Worker
from tests.pipelines.test_tiny_vae import save_tiny
from tests.support.checkpoints import Checkpoint

DRAWING: dict[str, Any] = {"prompt": "a sun over a lake", "steps": 2, "width": 64, "height": 64, "seed": 3}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose networks were loaded, and 'text' for every text tower, in order."""
    found: list[str] = []
    load_family, load_tower = loading.load_family, TextEncoders._load

    def family(request: Any, spec: Any, runtime: Any) -> Any:
        found.append(Path(spec.name).name)
        return load_family(request, spec, runtime)

    def tower(encoders: TextEncoders, name: str) -> Any:
        found.append("text")
        return load_tower(encoders, name)

    monkeypatch.setattr(loading, "load_family", family)
    monkeypatch.setattr(TextEncoders, "_load", tower)
    return found


@pytest.fixture
def settings(tmp_path: Path, eps_folder: Path, checkpoint: Callable[[str, str], Checkpoint]) -> Settings:
    """Of a server that offers 'demo', which is the default, 'other' and 'edits'."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "other").symlink_to(eps_folder)
    (models / "edits").symlink_to(checkpoint("cosxl-edit", "folder").path)
    return Settings(folder=tmp_path, models=models, devices=("cpu",), vram="1GB")


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


def networks(loads: list[str]) -> list[str]:
    return [name for name in loads if name != "text"]


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(f"/sdapi/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def drawn(client: TestClient) -> bytes:
    """The pixels of a picture."""
    file = base64.b64decode(post(client, "txt2img", **DRAWING)["images"][0])
    return Image.open(io.BytesIO(file)).tobytes()


def finished(client: TestClient, **task: Any) -> Any:
    """The document of a job of `/jobs` when it is done, and the model that its plan names."""
    document = client.post("/jobs", json={"kind": "render", "size": "64x64", "steps": 1, "prompt": "a", **task}).json()
    while document["status"] in ("queued", "running"):
        time.sleep(0.02)
        document = client.get(f"/jobs/{document['id']}").json()
    assert document["status"] == "done", document
    return document


def test_a_job_of_three_pictures_loads_once(client: TestClient, loads: list[str]) -> None:
    document = client.post("/jobs?count=3", json={"kind": "render", "prompt": "a lake", "size": "64x64", "steps": 1}).json()
    while client.get(f"/jobs/{document['id']}").json()["status"] != "done":
        time.sleep(0.02)
    assert len(client.get(f"/jobs/{document['id']}").json()["results"]) == 3
    assert loads == ["text", "text", "demo"]  # the shipped model has two text towers


def test_batches_of_a1111_load_once(client: TestClient, loads: list[str]) -> None:
    assert len(post(client, "txt2img", **DRAWING, n_iter=3)["images"]) == 3
    assert len(post(client, "txt2img", **DRAWING, batch_size=2, n_iter=2)["images"]) == 4
    assert networks(loads) == ["demo"]


def test_two_models_that_alternate_are_loaded_once_each(client: TestClient, loads: list[str]) -> None:
    for _ in range(3):
        for model in ("demo", "other"):
            post(client, "txt2img", **DRAWING, override_settings={"sd_model_checkpoint": model})
    assert networks(loads) == ["demo", "other"]


@pytest.mark.parametrize("previews", [False, True])
def test_what_a_job_is_planned_to_load_is_what_it_loads(settings: Settings, previews: bool) -> None:
    """The key of an estimate is that of the networks in memory afterwards, for renders and for refinements."""
    if previews:
        settings = replace(settings, tiny_vae=str(save_tiny(settings.folder / "tiny")))
    worker = Worker(settings, Library(settings), "cpu")
    Image.new("RGB", (32, 32), "red").save(settings.folder / "in.png")
    tasks = (
        RenderTask(prompt="a", size="64x64", steps=1, model="demo"),
        UpscaleTask(prompt="a", picture="in.png", scale=2, refine=True, steps=4, model="other"),
    )
    for index, task in enumerate(tasks):
        estimate = worker.estimate(task, settings.folder)
        assert estimate.model is not None and estimate.model not in worker.resident
        worker.run(task, settings.folder, f"result-{index}", lambda event: None)
        assert estimate.model in worker.resident
    assert len(worker.resident) == 2
    worker.unload()
    worker.load("demo")
    assert worker.resident == {worker.estimate(tasks[0], settings.folder).model}


def test_a_switch_is_the_default_of_every_api(client: TestClient, loads: list[str]) -> None:
    assert client.get("/sdapi/v1/options").json() == {"sd_model_checkpoint": "demo", "samples_format": "png"}
    post(client, "txt2img", **DRAWING)
    assert post(client, "options", sd_model_checkpoint="other") == {}
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "other"
    assert client.get("/models").json()["models"][0] == client.get("/v1/models").json()["data"][0]["id"] == "other"
    info = post(client, "txt2img", **DRAWING)["info"]
    assert '"sd_model_name": "other"' in info
    finished(client)
    answer = client.post("/v1/images/generations", json={"prompt": "a", "size": "64x64", "quality": "low"})
    assert answer.status_code == 200, answer.text
    assert (
        client.post("/plan", json={"kind": "render", "prompt": "a", "size": "64x64"}).json()["plan"]["model"].endswith("other")
    )
    assert networks(loads) == ["demo", "other"]
    own = post(client, "txt2img", **DRAWING, override_settings={"sd_model_checkpoint": "demo"})["info"]
    assert '"sd_model_name": "demo"' in own
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "other", "a request's own model is its own"
    post(client, "options", sd_model_checkpoint="demo")
    post(client, "txt2img", **DRAWING)
    assert networks(loads) == ["demo", "other"], "the model before stayed in memory"


@pytest.mark.parametrize("name", ["nobody", "", None, 3, ["demo"]])
def test_a_model_that_is_not_offered_is_refused_and_nothing_changes(client: TestClient, name: object) -> None:
    answer = client.post("/sdapi/v1/options", json={"sd_model_checkpoint": name})
    assert answer.status_code == 400 and answer.json()["error"] == "ModelError"
    assert "unknown model" in answer.json()["detail"] and "known: demo, edits, other" in answer.json()["detail"]
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "demo"


def test_options_that_cannot_be_set_are_named(client: TestClient) -> None:
    answer = post(client, "options", samples_format="webp", CLIP_stop_at_last_layers=2, sd_model_checkpoint="other")
    assert answer == {"ignored": ["CLIP_stop_at_last_layers", "samples_format"]}
    assert client.get("/sdapi/v1/options").json() == {"sd_model_checkpoint": "other", "samples_format": "png"}
    assert post(client, "options", **client.get("/sdapi/v1/options").json()) == {}


def test_after_a_reload_the_next_picture_loads_nothing(client: TestClient, loads: list[str]) -> None:
    post(client, "txt2img", **DRAWING)
    assert post(client, "unload-checkpoint") == {}
    loads.clear()
    assert post(client, "reload-checkpoint") == {}
    assert sorted(loads) == ["demo", "text", "text"]
    loads.clear()
    post(client, "reload-checkpoint")
    pixels = drawn(client)
    finished(client, size="96x64")
    assert loads == [], "a second reload and the pictures find it there"
    post(client, "unload-checkpoint")
    assert drawn(client) == pixels, "bit for bit that of a model loaded for it"
    post(client, "options", sd_model_checkpoint="edits")
    loads.clear()
    post(client, "reload-checkpoint")
    assert networks(loads) == ["edits"], "a model that edits, too"


def test_a_reload_that_has_no_room_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory (injected)")

    monkeypatch.setattr(loading, "load_family", full)
    answer = client.post("/sdapi/v1/reload-checkpoint")
    assert answer.status_code == 500 and answer.json()["error"] == "MemoryLadderError"
    assert "out of memory while loading demo" in answer.json()["detail"]


def begun_after(queue: JobQueue, seed: int) -> float:
    """Seconds from when a job is taken to the end of its first step."""
    job = queue.submit([RenderTask(prompt="a sun over a lake", size="64x64", steps=4, seed=seed)])
    heard: list[float] = []
    real = job.meter.hear

    def hear(event: hires.Event) -> None:
        if event.step >= 1 and not heard:
            heard.append(time.time())
        real(event)

    job.meter.hear = hear  # type: ignore[method-assign]
    job.ended.result(60)
    assert job.status == "done" and job.started is not None
    return heard[0] - job.started


def test_a_picture_of_a_loaded_model_begins_at_once(settings: Settings, loads: list[str]) -> None:
    """The rule is half a second; the bound leaves room for a machine that does something else meanwhile."""
    queue = JobQueue(settings, Library(settings))
    queue.start()
    try:
        first, second, third = (begun_after(queue, seed) for seed in range(3))
    finally:
        queue.close()
    print(f"first step after {first:.3f} s, of a loaded model after {second:.3f} and {third:.3f} s")
    assert networks(loads) == ["demo"]
    assert min(second, third) < 2.0
