"""Hundreds of requests that are wrong in every way: each gets a 4xx with a reason, and the server goes on in its memory."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.support.server import Live

JSON = {"content-type": "application/json"}
DRAWING = ("/sdapi/v1/txt2img", "/jobs", "/v1/images/generations", "/plan")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> str:
    """A PNG of a few bytes that claims, and would decode to, width x height pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")).decode()


def text_bomb() -> str:
    into = io.BytesIO()
    Image.new("RGB", (4, 4)).save(into, format="PNG")
    plain = into.getvalue()
    ztxt = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000), 9))
    return base64.b64encode(plain[:33] + ztxt + plain[33:]).decode()


def half_png() -> str:
    into = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(into, format="PNG")
    return base64.b64encode(into.getvalue()[: len(into.getvalue()) // 2]).decode()


def sized(path: str, width: Any, height: Any) -> dict[str, Any]:
    if path.startswith("/sdapi"):
        return {"prompt": "a", "width": width, "height": height}
    return {"prompt": "a", "kind": "render", "size": f"{width}x{height}"}


def malformed() -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """(method, path, body, headers) of requests."""
    for path in DRAWING:
        for body in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"3",
            b'"text"',
            b"{'a': 1}",
            b"\xff\xfe\x00",
            b'{"prompt": "\\ud800"',
            b"[" * 100_000,
        ):
            yield "POST", path, body, JSON
        for value in (None, 3, [], {}, True, ["a"]):
            if value is None and path.startswith("/sdapi"):
                continue  # A1111's clients send null for what they leave out
            yield "POST", path, json.dumps({**sized(path, 64, 64), "prompt": value}).encode(), JSON
        for width, height in (
            (0, 0),
            (-64, 64),
            (8, 8),
            (10**9, 10**9),
            (131_072, 131_072),
            (70_000, 64),
            ("a", 64),
            ("64; rm", 1),
            (64.5, 64),
        ):
            yield "POST", path, json.dumps(sized(path, width, height)).encode(), JSON
        yield "POST", path, json.dumps({**sized(path, 64, 64), "prompt": "a" * 10**6}).encode(), JSON
        yield (
            "POST",
            path,
            json.dumps(
                {
                    **sized(path, 64, 64),
                    "model": "../../../etc/passwd",
                    "override_settings": {"sd_model_checkpoint": "/etc/passwd"},
                }
            ).encode(),
            JSON,
        )
        yield "POST", path, json.dumps(sized(path, 64, 64)).encode(), {"content-type": "text/plain"}
        yield "PUT", path, b"{}", JSON
        yield "POST", path, json.dumps(sized(path, 64, 64)).encode(), {**JSON, "host": "evil.example"}
        yield "POST", path, json.dumps(sized(path, 64, 64)).encode(), {**JSON, "origin": "http://evil.example"}
        yield "POST", path, b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}", JSON
        yield (
            "POST",
            path,
            b'{"prompt": "a", "size": "64x64", "kind": "render", "cfg_scale": NaN, "guidance": NaN, "n": NaN}',
            JSON,
        )
    for name, values in (
        ("steps", (0, -1, 10**6, "many", 1.5)),
        ("seed", (-1, 2**63, "x", 1.5)),
        ("guidance", (-1, 1e9, "x")),
        ("strength", (0, 2, "x")),
        ("tile_px", (0, -5, 10**9)),
        ("preset", ("superb", 3)),
        ("format", ("exe", "../png")),
        ("bits", (7, "8")),
        ("stages", ("a", [3], ["1x1"] * 100, ["64x64,nothing=1"])),
        ("loras", (["../../etc/passwd"], [3])),
        ("vram", ("much", "-1GB", "999TB", 3)),
        ("invented", (1,)),
    ):
        for value in values:
            yield "POST", "/jobs", json.dumps({**sized("/jobs", 64, 64), name: value}).encode(), JSON
    pictures = [
        *("", "!", "not base64 at all", "data:image/png;base64", "data:image/png;base64,", "data:text/html,<b>", "AAAA"),
        *("http://169.254.169.254/latest/meta-data", "https://example.org/a.png", "file:///etc/passwd", "ftp://a/b"),
        *("/etc/passwd", "../../../etc/passwd", half_png(), text_bomb()),
        *(bomb(30_000, 30_000), bomb(2**31 - 1, 2**31 - 1), bomb(100_000, 2)),
        *(base64.b64encode(b).decode() for b in (b"GIF89a", b"II*\0\x08\0\0\0", b"<svg/>", b"cos\nsystem\n(S'id'\ntR.")),
    ]
    for picture in pictures:
        yield "POST", "/sdapi/v1/img2img", json.dumps({"prompt": "a", "init_images": [picture]}).encode(), JSON
        yield "POST", "/sdapi/v1/extra-single-image", json.dumps({"image": picture, "upscaler_1": "Lanczos"}).encode(), JSON
        yield "POST", "/sdapi/v1/png-info", json.dumps({"image": picture}).encode(), JSON
        yield "POST", "/jobs", json.dumps({"kind": "upscale", "picture": picture}).encode(), JSON
    for path in (
        *("/jobs/../../etc/passwd", "/jobs/..%2f..%2fetc%2fpasswd", "/jobs/%00", "/jobs/a/result", "/jobs/a/zoom"),
        *("/jobs/a/events", "/jobs/a/zoom/0/0/0_0.jpg", "/jobs/a/zoom/x/y/z_w.jpg", "/web/..%2f..%2fcli.py"),
        *("/web/../index.html", "/web/%2e%2e/%2e%2e/x", "/sdapi/v1/nothing", "/v1/nothing", "/v1/models/nobody"),
        *("/etc/passwd", "//etc/passwd"),
    ):
        yield "GET", path, b"", {}
    yield "POST", "/jobs?count=0", json.dumps(sized("/jobs", 64, 64)).encode(), JSON
    yield "POST", "/jobs?count=100000", json.dumps(sized("/jobs", 64, 64)).encode(), JSON
    yield "POST", "/jobs", json.dumps(sized("/jobs", 64, 64)).encode(), {**JSON, "idempotency-key": "../../x"}
    yield "POST", "/v1/images/edits", b"{}", JSON
    yield "POST", "/v1/images/edits", b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}
    yield "POST", "/v1/images/edits", b"", {"content-type": "multipart/form-data"}


def sent(port: int, content: bytes, wait: float = 5.0) -> bytes:
    """The answer to raw bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as opened:
        opened.sendall(content)
        answer = b""
        while part := opened.recv(65536):
            answer += part
            if b"\r\n\r\n" in answer and b"HTTP/1.1 4" in answer:
                break
        return answer


def finished(client: httpx.Client, name: str) -> None:
    while client.get(f"/jobs/{name}").json()["status"] != "done":
        time.sleep(0.05)


def test_malformed_requests_are_refused_with_a_reason_and_change_nothing(tmp_path: Path) -> None:
    server = Live(tmp_path / "jobs", "--max-body", "4MB")
    good = {"kind": "render", "prompt": "a lake", "size": "64x64", "steps": 1, "seed": 1}
    with httpx.Client(base_url=server.url, timeout=30) as client:
        finished(client, client.post("/jobs", json=good).json()["id"])
        requests = list(malformed())
        assert len(requests) >= 200
        held = []
        for round_ in range(3):
            for method, path, body, headers in requests:
                answer = client.request(method, path, content=body, headers=headers)
                assert 400 <= answer.status_code < 500, (method, path, body[:200], answer.status_code, answer.text[:300])
                found = answer.json()
                reason = found.get("detail") or found["error"]["message"]
                assert isinstance(reason, str) and reason and len(answer.content) < 4000, (path, answer.text[:300])
            held.append(server.resident_bytes)
            assert client.get("/health").status_code == 200, round_
        assert held[2] - held[0] < 16 * 2**20, "memory stays flat"
        assert client.get("/jobs").json()[0]["prompt"] == "a lake" and len(client.get("/jobs").json()) == 1
        too_long = client.post("/jobs", content=b"a" * 5_000_000, headers=JSON)
        assert too_long.status_code == 413 and "limit" in too_long.json()["detail"]
        finished(client, client.post("/jobs", json=good).json()["id"])
    folders = {path.name for path in (server.folder / "jobs").iterdir()}
    assert len(folders) == 2, "nothing of a refused request is left"
    assert list((server.folder / "incoming").iterdir()) == []
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_bodies_that_stop_or_never_end(server: Live) -> None:
    head = b"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as opened:  # half a body, then gone
        opened.sendall(head + b"Content-Length: 1000\r\n\r\n" + b'{"prompt": "a')
    assert b" 413 " in sent(server.port, head + b"Content-Length: 999999999999\r\n\r\n")
    assert b" 400 " in sent(server.port, head + b"Content-Length: many\r\n\r\n")
    assert b" 400 " in sent(server.port, b"NONSENSE\r\n\r\n")
    assert b" 400 " in sent(server.port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_five_hundred_half_open_connections_stop_nobody(server: Live) -> None:
    with ExitStack() as stack:
        for _ in range(515):
            opened = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            opened.sendall(b"GET / HTTP/1.1\r\nHost: 127")
        for address in ("127.0.0.2", "127.0.0.1"):
            transport = httpx.HTTPTransport(local_address=address)
            with httpx.Client(transport=transport, timeout=5) as client:
                assert client.get(f"{server.url}/health").status_code == 200, address
