"""The check before every request: its origin, its key and the length of its body."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from urllib.parse import SplitResult, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hires.server.settings import Settings

LOCAL = ("127.0.0.1", "localhost", "::1")
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    ),
]


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """An ASGI middleware that lets a request through with its whole body, or answers it.

    400 for a host name that is not the server's and 403 for a request of another site's page, so that no page which the user
    visits can use a server on this machine. 401 without the key, 408 for a body that stops, 413 for one that is too long, 503
    where the bodies that are being read would fill the memory.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.hosts = {*LOCAL, settings.host, *settings.hosts}
        self.any_host = settings.host in ("0.0.0.0", "::") and not settings.hosts  # guarded by its key
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = b""
        try:
            self.check_origin(scope["method"], headers)
            self.check_key(headers)
            body = await self._body(headers, receive)
        except Refused as refused:
            await _answer(send, refused.status, refused.reason)
            return
        try:
            await self.app(scope, _replay(body, receive), _with_headers(send))
        finally:
            self._held -= len(body)

    def check_origin(self, method: str, headers: dict[str, str]) -> None:
        """Refused where the request names another host, or none that can be read, or comes from another site's page."""
        host = headers.get("host", "")
        name = _address("host", f"//{host}", host).hostname if host else None
        if not self.any_host and name is not None and name not in self.hosts:
            raise Refused(
                400, f"host {host[:100]!r}: is not a name of this server; add {name} to its `hosts` (allow-host of hires serve)"
            )
        origin = headers.get("origin")
        if origin is None:
            return
        site = _address("origin", origin, origin).netloc
        if method not in SAFE and site.lower() != host.lower():
            raise Refused(403, f"origin {origin[:100]!r}: pages of other sites cannot use this server")

    def check_key(self, headers: dict[str, str]) -> None:
        """Refused where a key is set and the request has none or another. Compared in constant time."""
        expected = self.settings.api_key
        if expected is None:
            return
        key = _key(headers)
        if key is None or not hmac.compare_digest(key.encode(), expected.encode()):
            raise Refused(401, "give the server's key: 'Authorization: Bearer KEY', or as the password of HTTP Basic")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, no longer than allowed; its bytes are counted until the answer is sent."""
        most = self.settings.limits.body_bytes
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise Refused(400, f"content-length {length[:40]!r}: is no number")
        if int(length) > most:
            raise Refused(413, f"body of {length} bytes: the limit is {most}")
        parts: list[bytes] = []
        size, begun = 0, time.monotonic()
        try:
            while True:
                message = await self._part(receive, begun)
                if message["type"] == "http.disconnect":
                    raise Refused(400, "body: the connection ended before it did")
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise Refused(413, f"body: is over the limit of {most} bytes")
                self._held += len(part)
                parts.append(part)
                if self._held > 2 * most:
                    raise Refused(503, "the bodies of other requests fill the memory; try again")
                if not message.get("more_body", False):
                    return b"".join(parts)
        except Refused:
            self._held -= sum(len(part) for part in parts)
            raise

    async def _part(self, receive: Receive, begun: float) -> Message:
        """The next part of a body that began then."""
        limits = self.settings.limits
        left = begun + limits.whole_body_seconds - time.monotonic()
        try:
            return await asyncio.wait_for(receive(), max(0.0, min(limits.body_seconds, left)))
        except TimeoutError:
            if left < limits.body_seconds:
                raise Refused(408, f"body: did not end within {limits.whole_body_seconds:g} s") from None
            raise Refused(408, f"body: nothing came for {limits.body_seconds:g} s") from None


def _address(header: str, address: str, given: str) -> SplitResult:
    """The parts of an address that a header gives. Refused where it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        raise Refused(400, f"{header} {given[:100]!r}: is no address") from None


def _key(headers: dict[str, str]) -> str | None:
    if "x-api-key" in headers:
        return headers["x-api-key"]
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body in one message, then what follows it."""
    replayed = False

    async def receive_again() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()  # the disconnect
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _with_headers(send: Send) -> Send:
    """A `send` that adds the security headers which an answer does not set itself."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            message = {**message, "headers": [*message["headers"], *(pair for pair in HEADERS if pair[0] not in present)]}
        await send(message)

    return send_with_headers


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps(
        {"error": {"message": reason, "type": "invalid_request_error", "code": status}, "detail": reason}
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of the request is not read
        *HEADERS,
    ]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="hires"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
