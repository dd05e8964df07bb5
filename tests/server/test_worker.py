"""A worker keeps its models from one task to the next, and lets them go."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hires
from hires.errors import RequestError
from hires.server.bodies import RenderTask, UpscaleTask
from hires.server.queue import JobQueue
from hires.server.settings import Library, Settings
from hires.server.worker import Worker

PROMPT = "a sun over a lake"


def rendered(worker: Worker, folder: Path, seed: int) -> object:
    task = RenderTask(prompt=PROMPT, size="96x64", steps=2, seed=seed)
    picture = worker.run(task, folder, f"result-{seed}", lambda event: None)
    return np.asarray(Image.open(folder / picture.file))


def test_models_stay_between_tasks_and_the_pictures_are_those_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(folder=tmp_path, devices=("cpu",))
    worker = Worker(settings, Library(settings), "cpu")
    first = rendered(worker, tmp_path, 1)
    assert worker.models.names == ("demo",)
    for name in ("load_network", "load_vae"):
        monkeypatch.setattr(f"hires.pipelines.load.{name}", lambda *args: pytest.fail("it was loaded again"))
    second = rendered(worker, tmp_path, 2)
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "in.png")
    enlarge = UpscaleTask(prompt=PROMPT, picture="in.png", scale=2, refine=True, steps=4, seed=1)
    assert worker.run(enlarge, tmp_path, "large", lambda event: None).size == hires.plan(size="96x64").output
    monkeypatch.undo()
    for seed, pixels in ((1, first), (2, second)):
        assert np.array_equal(pixels, hires.render(PROMPT, size="96x64", steps=2, seed=seed, device="cpu").pixels)
    worker.unload()
    assert worker.models.names == ()


def test_a_refining_enlargement_is_planned_with_the_options_that_draw_it(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path, devices=("cpu",))
    worker = Worker(settings, Library(settings), "cpu")
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(tmp_path / "in.png")
    task = UpscaleTask(
        prompt="a (sun:1.3)", prompt_syntax="none", picture="in.png", scale=2, refine=True, steps=4, colour_fix="none"
    )
    request, _ = worker._drawing(task, tmp_path) or pytest.fail("nothing to draw")
    assert (request.prompt_syntax, request.colour_fix, request.strength) == ("none", None, 0.35)
    assert worker.run(task, tmp_path, "large", lambda event: None).size.width == 96
    with pytest.raises(RequestError, match="takes no weights"):
        worker.plan(task.model_copy(update={"prompt_syntax": None}), tmp_path)


def test_a_worker_that_waits_lets_its_models_go(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path, devices=("cpu",), idle_unload_seconds=1.0)
    queue = JobQueue(settings, Library(settings))
    queue.start()
    try:
        job = queue.submit([RenderTask(prompt=PROMPT, size="64x64", steps=1, seed=index) for index in range(3)])
        job.ended.result(timeout=60)
        assert job.status == "done" and queue.workers[0].models.names == ("demo",)
        limit = time.monotonic() + 20
        while queue.workers[0].models.names and time.monotonic() < limit:
            time.sleep(0.1)
        assert queue.workers[0].models.names == ()
    finally:
        queue.close()


@pytest.mark.parametrize("seconds", [0.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(RequestError, match=r"idle_unload .*give seconds, 1 or more"):
        Settings(folder=tmp_path, idle_unload_seconds=seconds)
