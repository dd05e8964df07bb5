"""The `openai` package against the running server."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.server import Live

openai: Any = pytest.importorskip("openai", reason="openai is not installed (extra `dev`)")


@pytest.fixture(scope="module")
def client(server: Live) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=120)


def opened(data: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def png(picture: Image.Image) -> tuple[str, bytes, str]:
    into = io.BytesIO()
    picture.save(into, format="PNG")
    return "picture.png", into.getvalue(), "image/png"


def test_generations(client: Any) -> None:
    answer = client.images.generate(prompt="a lake", model="gpt-image-1", n=2, size="128x96", quality="low")
    assert [opened(data).size for data in answer.data] == [(128, 96)] * 2
    assert answer.created > 1.7e9
    first, second = (np.asarray(opened(data)) for data in answer.data)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats(client: Any, name: str, kind: str) -> None:
    answer = client.images.generate(prompt="a lake", model="demo", size="64x64", quality="low", output_format=name)
    assert opened(answer.data[0]).format == kind


def test_a_url_serves_the_picture(client: Any) -> None:
    answer = client.images.generate(prompt="a lake", model="demo", size="64x48", quality="low", response_format="url")
    assert Image.open(io.BytesIO(httpx.get(answer.data[0].url).content)).size == (64, 48)


def test_edits_redraw_what_is_transparent(client: Any) -> None:
    given = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    mask = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (48, 0, 96, 64))
    answer = client.images.edit(image=png(given), mask=png(mask), prompt="a lake", model="demo", size="auto", quality="low")
    drawn = np.asarray(opened(answer.data[0]))
    assert np.array_equal(drawn[:, :48], np.asarray(given)[:, :48])
    assert (drawn[:, 48:] != np.asarray(given)[:, 48:]).mean() > 0.9
    whole = client.images.edit(image=[png(given)], prompt="a lake", model="demo", size="128x128", quality="low")
    assert opened(whole.data[0]).size == (128, 128)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_errors_in_the_packages_words(client: Any) -> None:
    for call, error, reason in (
        (lambda: client.images.generate(prompt="a lake", size="8x8"), openai.BadRequestError, "at least"),
        (lambda: client.images.generate(prompt="a lake", model="nobody"), openai.NotFoundError, "unknown model"),
        (lambda: client.images.generate(prompt="a lake", quality="superb"), openai.BadRequestError, "quality"),
        (lambda: client.images.generate(prompt="a lake", n=900), openai.BadRequestError, "at most"),
        (
            lambda: client.images.edit(image=("a.png", b"no", "image/png"), prompt="a lake"),
            openai.BadRequestError,
            "cannot be read",
        ),
    ):
        with pytest.raises(error) as raised:
            call()
        assert reason in raised.value.message and raised.value.body["type"] == "invalid_request_error"
