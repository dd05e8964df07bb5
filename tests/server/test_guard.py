"""The key, hosts and origins, and what may be served beyond this machine."""

from __future__ import annotations

import asyncio
import base64
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from hires.cli.display import in_flags
from hires.cli.serve import ServeOptions
from hires.errors import ModelError, RequestError
from hires.server.app import create_app
from hires.server.guard import Guard, Refused
from hires.server.settings import Library, Limits, Settings

KEY = "a-key-of-the-server"


def client(folder: Path, **options: object) -> TestClient:
    return TestClient(create_app(Settings(folder=folder, **options)), base_url="http://127.0.0.1")


def test_without_the_key_nothing_is_answered(tmp_path: Path) -> None:
    guarded = client(tmp_path, api_key=KEY)
    basic = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"Authorization": f"Basic {basic}"}, {"X-API-Key": KEY}):
        assert guarded.get("/health", headers=headers).status_code == 200
    wrong = base64.b64encode(b"anyone:wrong").decode()
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {wrong}"},
                    {"Authorization": "Basic !"}, {"X-API-Key": KEY[:-1]}, {"X-API-Key": "ö".encode()}):  # fmt: skip
        for path in ("/health", "/", "/docs", "/openapi.json", "/jobs", "/sdapi/v1/options", "/web/app.js"):
            answer = guarded.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic"), (path, headers)


def test_other_hosts_and_other_sites_pages_are_refused(tmp_path: Path) -> None:
    plain = client(tmp_path, hosts=("workstation",))
    for host, status in (
        ("127.0.0.1:7860", 200),
        ("localhost", 200),
        ("workstation:1", 200),
        ("[::1]:7860", 200),
        ("evil.example", 400),
    ):
        assert plain.get("/health", headers={"Host": host}).status_code == status, host
    same = plain.post("/plan", json={"kind": "render", "prompt": "a", "size": "64x64"}, headers={"Origin": "http://127.0.0.1"})
    assert same.status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8000", "https://127.0.0.1.evil.example"):
        assert plain.post("/plan", json={}, headers={"Origin": origin}).status_code == 403, origin


@pytest.mark.parametrize("options", [{}, {"host": "0.0.0.0", "api_key": KEY}])
def test_a_host_or_origin_that_is_no_address_is_refused(tmp_path: Path, options: dict[str, object]) -> None:
    plain = client(tmp_path, **options)
    for header, value in (("Host", "["), ("Host", "[::1"), ("Host", "a]"), ("Origin", "http://["), ("Origin", "//[::1")):
        for method in ("GET", "POST"):
            answer = plain.request(method, "/plan", headers={header: value})
            assert answer.status_code == 400 and "is no address" in answer.json()["detail"], (header, value)


def test_beyond_this_machine_only_with_a_key(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="`api_key`"):
        Settings(folder=tmp_path, host="0.0.0.0")
    with pytest.raises(RequestError, match="8 or more"):
        Settings(folder=tmp_path, host="0.0.0.0", api_key="short")
    open_to_all = client(tmp_path, host="0.0.0.0", api_key=KEY)
    assert open_to_all.get("/health", headers={"Host": "any.example", "X-API-Key": KEY}).status_code == 200


@pytest.mark.parametrize(
    ("options", "python", "flag"),
    [
        ({"port": 70_000}, "port 70000: ", "--port 70000: "),
        ({"host": "0.0.0.0"}, "add an `api_key`", "add an --api-key"),
        ({"api_key": "short"}, "api_key of 5 ", "--api-key of 5 "),
        ({"models": Path("nowhere")}, "models nowhere: ", "--models nowhere: "),
        ({"loras": Path("nowhere")}, "loras nowhere: ", "--loras nowhere: "),
        ({"upscalers": Path("nowhere")}, "upscalers nowhere: ", "--upscalers nowhere: "),
        ({"limits": Limits(waiting=0)}, "waiting 0: ", "--queue 0: "),
        ({"devices": ("cpu", "cpu")}, "device cpu, cpu: ", "--device cpu, cpu: "),
    ],
)
def test_a_setting_is_refused_by_its_python_name_and_shown_by_its_flag(
    tmp_path: Path, options: dict[str, object], python: str, flag: str
) -> None:
    with pytest.raises(RequestError) as refused:
        Settings(folder=tmp_path, **options)
    assert python in str(refused.value)
    assert flag in in_flags(str(refused.value), (ServeOptions,))


def test_only_what_lies_in_the_folders_can_be_named(tmp_path: Path) -> None:
    for folder, name in (
        ("loras", "style.safetensors"),
        ("upscalers", "net.pth"),
        ("models", "big.safetensors"),
        ("models", ".hidden.pth"),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"x")
    settings = Settings(folder=tmp_path, loras=tmp_path / "loras", upscalers=tmp_path / "upscalers", models=tmp_path / "models")
    library = Library(settings)
    assert [offer.name for offer in library.models()] == ["demo", "big"]
    assert library.model("big") == library.model("big.safetensors [0123abcd]") == str(tmp_path / "models" / "big.safetensors")
    assert (
        library.lora("style:0.5").path == str(tmp_path / "loras" / "style.safetensors")
        and library.lora("style:0.5").scale == 0.5
    )
    assert library.upscaler("net") == str(tmp_path / "upscalers" / "net.pth") and library.upscaler("lanczos") == "lanczos"
    for name in ("../models/big.safetensors", str(tmp_path / "models" / "big.safetensors"), ".hidden", "org/name", ""):
        with pytest.raises(ModelError, match="unknown model"):
            library.model(name)
        with pytest.raises(RequestError, match="unknown LoRA"):
            library.lora(name)
        if name:
            with pytest.raises(RequestError, match="unknown upscaler"):
                library.upscaler(name)


def test_too_many_bytes_at_once(tmp_path: Path) -> None:
    small = client(tmp_path, limits=Limits(body_bytes=1000))
    assert small.post("/plan", content=b"a" * 1001).status_code == 413
    assert small.post("/plan", content=iter([b"a" * 600, b"a" * 600])).status_code == 413
    assert small.post("/plan", json={"kind": "render", "prompt": "a", "size": "64x64"}).status_code == 200


def test_a_body_that_trickles_ends_in_time(tmp_path: Path) -> None:
    """No part of it is late, and its whole time is over."""
    guard = Guard(lambda *_: None, Settings(folder=tmp_path, limits=Limits(body_seconds=5, whole_body_seconds=0.1)))

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"a", "more_body": True}

    with pytest.raises(Refused, match=r"did not end within 0\.1 s") as refused:
        asyncio.run(asyncio.wait_for(guard._body({}, receive), 2))
    assert refused.value.status == 408 and guard._held == 0


def test_who_is_refused_has_to_connect_again(tmp_path: Path) -> None:
    """So that the body of a request without the key is not read on for ever."""
    answer = client(tmp_path, api_key=KEY).post("/plan", json={})
    assert answer.status_code == 401 and answer.headers["connection"] == "close"


def test_pages_say_what_they_may_load(tmp_path: Path) -> None:
    plain = client(tmp_path)
    answer = plain.get("/")
    assert answer.status_code == 200 and "script-src" not in answer.headers["content-security-policy"]
    assert (
        answer.headers["content-security-policy"].startswith("default-src 'self'")
        and answer.headers["x-frame-options"] == "DENY"
    )
    for page in ("/", "/docs"):
        answer = plain.get(page)
        assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith("default-src 'self';"), page
        for script, content in re.findall(r"<script([^>]*)>([^<]*)", answer.text):
            assert "src=" in script and not content.strip(), "the policy forbids scripts within a page"
        assert "<style" not in answer.text and not re.search(r"\son\w+=", answer.text)
        loaded = re.findall(r"<(?:link|script|img)[^>]*(?:src|href)=\"([^\"]*)\"", answer.text)
        assert len(loaded) >= 3
        for address in loaded:
            part = plain.get(address)
            media = {"js": "text/javascript", "css": "text/css"}[address.rsplit(".", 1)[1]]
            assert address.startswith("/web/") and part.status_code == 200, address
            assert part.headers["content-type"].startswith(media), address
    assert "SwaggerUIBundle" in plain.get("/web/docs.js").text
    assert plain.get("/openapi.json").status_code == 200
    assert plain.get("/web/openseadragon.LICENSE.txt").text.count("Redistribution") >= 1
