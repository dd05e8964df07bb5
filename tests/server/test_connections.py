"""Connections that stay silent or are many: closed, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from hires.server.connections import bounded, network_of
from hires.server.settings import Limits

LIMITS = Limits(header_seconds=0.2, connections=8)
REQUEST = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HALF = REQUEST[:-4]


class Served:
    """A server whose answers to `/hold` wait for `go`."""

    def __init__(self, limits: Limits) -> None:
        self.go = threading.Event()
        http = bounded(limits)
        config = uvicorn.Config(self.answer, log_level="error", lifespan="off", interface="asgi3", http=http, ws="none")
        self.server = uvicorn.Server(config)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(2048)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            while not self.go.is_set():
                await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def connect(self, content: bytes, address: str = "127.0.0.1") -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port), 5, source_address=(address, 0))
        opened.sendall(content)
        return opened

    def ask(self, address: str = "127.0.0.1") -> bytes:
        with self.connect(REQUEST, address) as opened:
            return answer(opened)

    def stop(self) -> None:
        self.go.set()
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(LIMITS)
    yield served
    served.stop()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def answer(opened: socket.socket) -> bytes:
    """One answer, to its end."""
    content = b""
    while not content.endswith(b"ok") and (part := opened.recv(65536)):
        content += part
    return content


def closed_after(opened: socket.socket, begun: float) -> tuple[float, bytes]:
    """Seconds until the server closed a connection, and what it sent."""
    content = b""
    with contextlib.suppress(ConnectionError):
        while part := opened.recv(65536):
            content += part
    return time.monotonic() - begun, content


def test_a_header_that_does_not_come_or_end_is_answered_by_408(served: Served, stack: ExitStack) -> None:
    begun = time.monotonic()
    silent, half = stack.enter_context(served.connect(b"")), stack.enter_context(served.connect(HALF))
    trickled = stack.enter_context(served.connect(b"GET / HTTP/1.1\r\nX: "))
    with contextlib.suppress(ConnectionError):
        for _ in range(20):
            trickled.sendall(b"a")
            time.sleep(0.02)
    for opened in (silent, half, trickled):
        seconds, content = closed_after(opened, begun)
        assert seconds < 2
        assert b" 408 " in content or opened is trickled, content  # what it sent meanwhile may cut the answer off


def test_a_second_header_has_its_time_too_and_a_silent_connection_stays(served: Served, stack: ExitStack) -> None:
    kept = stack.enter_context(served.connect(REQUEST))
    assert b" 200 " in answer(kept)
    time.sleep(2 * LIMITS.header_seconds)
    kept.sendall(REQUEST)
    assert b" 200 " in answer(kept), "silence between requests has uvicorn's own, longer time"
    begun = time.monotonic()
    kept.sendall(HALF)
    seconds, content = closed_after(kept, begun)
    assert seconds < 2 and b" 408 " in content


def test_a_body_takes_longer_than_a_header_may(served: Served, stack: ExitStack) -> None:
    slow = stack.enter_context(served.connect(b"POST /hold HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\na"))
    time.sleep(2 * LIMITS.header_seconds)
    slow.sendall(b"b")
    served.go.set()
    assert b" 200 " in answer(slow)


def test_half_open_connections_of_one_address_stop_nobody(served: Served, stack: ExitStack) -> None:
    for _ in range(5 * LIMITS.connections):
        stack.enter_context(served.connect(HALF))
    for address in ("127.0.0.2", "127.0.0.1"):
        assert b" 200 " in served.ask(address), address
    assert len(served.server.server_state.connections) <= LIMITS.connections + 1


def test_connections_at_work_stay_and_one_more_of_their_address_is_refused(served: Served, stack: ExitStack) -> None:
    hold = REQUEST.replace(b"GET /", b"GET /hold")
    working = [stack.enter_context(served.connect(hold)) for _ in range(LIMITS.connections)]
    end = time.monotonic() + 5
    while len(served.server.server_state.tasks) < LIMITS.connections:
        assert time.monotonic() < end
        time.sleep(0.01)
    refused = stack.enter_context(served.connect(b""))
    assert b" 503 " in closed_after(refused, 0.0)[1]
    assert b" 200 " in served.ask("127.0.0.2")
    served.go.set()
    assert all(b" 200 " in answer(opened) for opened in working)
    assert b" 200 " in served.ask(), "a connection that waits for its next request makes room"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("testclient", "other", False),
    ],
)
def test_addresses_that_count_as_one(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same
