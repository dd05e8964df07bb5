"""What stands before every request: whom it comes from, its key, and the length of its body. Pure ASGI."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
from typing import Any
from urllib.parse import urlsplit

from hires.server.settings import Settings

Scope = dict[str, Any]
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
    """Around the application. 400 for a host that the server does not go by and 403 for another page's request (so no page
    that the user visits can use a server on this machine), 401 without the key, 408 for a body that stops, 413 for one that is
    too long, 503 where the bodies that are being read would fill the memory."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.hosts = {*LOCAL, settings.host, *settings.hosts}
        self.any_host = settings.host in ("0.0.0.0", "::") and not settings.hosts  # guarded by its key
        self._held = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
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
        """Refused where the request names another host, or comes from another site's page."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if host else None
        if not self.any_host and name is not None and name not in self.hosts:
            raise Refused(400, f"host {host[:100]!r}: this server does not go by that name; start it with --allow-host {name}")
        origin = headers.get("origin")
        if origin is not None and method not in SAFE and urlsplit(origin).netloc.lower() != host.lower():
            raise Refused(403, f"origin {origin[:100]!r}: pages of other sites cannot use this server")

    def check_key(self, headers: dict[str, str]) -> None:
        """Refused where a key is set and the request has none or another. Compared in constant time."""
        wanted = self.settings.api_key
        if wanted is None:
            return
        given = _key(headers)
        if given is None or not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refused(401, "give the server's key: 'Authorization: Bearer KEY', or as the password of HTTP Basic")

    async def _body(self, headers: dict[str, str], receive: Any) -> bytes:
        """The whole body, no longer than allowed; what it takes is counted until the answer is there."""
        most = self.settings.limits.body_bytes
        length = headers.get("content-length", "0")
        if not length.isdigit():
            raise Refused(400, f"content-length {length[:40]!r}: is no number")
        if int(length) > most:
            raise Refused(413, f"body of {length} bytes: the limit is {most}")
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), self.settings.limits.body_seconds)
                except TimeoutError:
                    raise Refused(408, f"body: nothing came for {self.settings.limits.body_seconds:g} s") from None
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


def _replay(body: bytes, receive: Any) -> Any:
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()  # the disconnect
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _with_headers(send: Any) -> Any:
    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            message = message | {"headers": [*message["headers"], *(pair for pair in HEADERS if pair[0] not in present)]}
        await send(message)

    return sent


async def _answer(send: Any, status: int, reason: str) -> None:
    body = json.dumps(
        {"error": {"message": reason, "type": "invalid_request_error", "code": status}, "detail": reason}
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="hires"'))
    if status in (400, 408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
