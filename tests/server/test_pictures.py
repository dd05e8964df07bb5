"""The pictures of a request are counted before one of them is decoded."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import ImageFile

from hires.errors import RequestError
from hires.server.app import create_app
from hires.server.pictures import check_sum
from hires.server.queue import JobQueue
from hires.server.routes.waiting import take_in
from hires.server.settings import Library, Limits, Settings
from tests.support.sent_pictures import png, png_base64
from tests.support.server import Live

LIMITS = Limits(input_pixels=10_000, request_pixels=15_000, pictures=3)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(folder=tmp_path, limits=LIMITS)), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the pictures that were decoded."""
    sizes: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def counted(picture: ImageFile.ImageFile) -> Any:
        if picture.tile:
            sizes.append(picture.size)
        return load(picture)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    return sizes


def bodies(picture: str) -> dict[str, dict[str, Any]]:
    """Requests of two pictures, as (path, its body)."""
    return {
        "/jobs": {"kind": "render", "size": "64x64", "init": picture, "mask": picture},
        "/plan": {"kind": "render", "size": "64x64", "init": picture, "mask": picture},
        "/sdapi/v1/img2img": {"init_images": [picture, picture]},
        "/sdapi/v1/img2img?mask": {"init_images": [picture], "mask": picture},
        "/sdapi/v1/extra-batch-images": {"upscaler_1": "Lanczos", "imageList": [{"data": picture}, {"data": picture}]},
    }


@pytest.mark.parametrize("path", bodies(""))
def test_more_pixels_in_sum_than_allowed_are_refused_before_one_is_decoded(
    client: TestClient, decoded: list[tuple[int, int]], path: str
) -> None:
    answer = client.post(path, json=bodies(png_base64(100, 100))[path])
    assert answer.status_code == 400 and "megapixels in one request" in answer.json()["detail"], answer.text
    assert decoded == []


def test_an_edit_of_openai_counts_picture_and_mask(client: TestClient, decoded: list[tuple[int, int]]) -> None:
    files = {"image": png(100, 100), "mask": png(100, 100, "RGBA")}
    answer = client.post("/v1/images/edits", data={"prompt": "a"}, files=files)
    assert answer.status_code == 400 and "in one request" in answer.json()["error"]["message"]
    assert decoded == []


def test_more_pictures_than_allowed_are_refused_before_one_is_decoded(
    client: TestClient, decoded: list[tuple[int, int]]
) -> None:
    pictures = [png_base64(16, 16)] * 4
    for path, body in (
        ("img2img", {"init_images": pictures}),
        ("img2img", {"init_images": pictures[:1], "batch_size": 4}),
        ("img2img", {"init_images": pictures[:2], "mask": pictures[0], "n_iter": 2}),
        ("extra-batch-images", {"upscaler_1": "Lanczos", "imageList": [{"data": text} for text in pictures]}),
    ):
        answer = client.post(f"/sdapi/v1/{path}", json=body)
        assert answer.status_code == 422 and "this server makes 3 at most" in answer.json()["detail"], answer.text
    assert decoded == []


def test_the_picture_of_a_jobs_tasks_is_decoded_and_stored_once(client: TestClient, decoded: list[tuple[int, int]]) -> None:
    body = {"kind": "upscale", "picture": png_base64(24, 16), "scale": 1}
    job = client.post("/jobs?count=3", json=body).json()
    queue: JobQueue = client.app.state.queue  # type: ignore[attr-defined]
    stored = queue.get(job["id"])
    assert stored is not None and {task.picture for task in stored.tasks} == {"input-picture.png"}
    stored.ended.result(60)
    assert stored.status == "done" and len(stored.pictures) == 3
    assert len([path for path in stored.folder.iterdir() if path.name.startswith("input")]) == 1


def test_each_picture_and_their_sum_have_a_limit() -> None:
    plain = png(100, 100)
    check_sum([("a", plain), ("b", png(50, 100))], LIMITS)
    with pytest.raises(RequestError, match=r"^b: with those before"):
        check_sum([("a", plain), ("b", base64.b64encode(plain).decode())], LIMITS)
    with pytest.raises(RequestError, match=r"^c of 101x100: is over the limit"):
        check_sum([("c", png(101, 100))], LIMITS)
    with pytest.raises(RequestError, match=r"^d: is empty"):
        check_sum([("d", b"")], LIMITS)


def test_few_requests_decode_at_a_time(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path)
    queue = JobQueue(settings, Library(settings), [])
    lock, at_work, most = threading.Lock(), 0, 0

    def decode() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01)
        with lock:
            at_work -= 1

    async def all_at_once() -> None:
        await asyncio.gather(*(take_in(queue, decode) for _ in range(12)))

    asyncio.run(all_at_once())
    assert most == 2


@pytest.mark.slow
def test_a_megabyte_and_a_half_of_bombs_takes_little_memory(tmp_path: Path) -> None:
    server = Live(tmp_path / "jobs")
    bomb = png_base64(12_200, 12_200, "1")
    assert len(bomb) < 60_000
    with httpx.Client(base_url=server.url, timeout=60) as client:
        client.get("/models")
        before, most = server.peak_bytes, 0
        for path, body in bodies(bomb).items():
            count = 28 if path.endswith("img2img") else 2
            body = {"init_images": [bomb] * count} if count > 2 else body
            if path.endswith("extra-batch-images"):
                body["imageList"] = [{"data": bomb}] * 28
            if path in ("/jobs", "/plan"):
                body |= {"control": bomb}
            if path.endswith("?mask"):
                body["init_images"] *= 27
            assert client.post(path, json=body).status_code == 400, path
            most = max(most, server.peak_bytes)
        assert most - before < 200 * 2**20, (before, most)
    server.stop()
