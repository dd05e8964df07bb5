"""Connections that send nothing, or are too many, are closed before they cost others their turn."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from hires.server.settings import Limits


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a time for a request's header and a number of connections for each address.

    A connection whose header is late gets 408. An address that has its number loses a connection that waits for a request, the
    one that waited longest, to a new one; where all of them are at work the new one gets 503.
    """

    limits: ClassVar[Limits]
    network: str | None = None
    """What its address counts as; None for a socket without one."""
    header_timer: asyncio.TimerHandle | None = None
    """Set while a header is awaited that has begun, or the first of a connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first header, and keep to the number of connections."""
        super().connection_made(transport)
        self.network = None if self.client is None else network_of(self.client[0])
        self._await_header()
        same = [other for other in self.connections if isinstance(other, BoundedProtocol) and other._shares_address(self)]
        if len(same) > self.limits.connections:
            waiting = [(other.waits_since, other) for other in same if other is not self and other.waits_since is not None]
            if waiting:
                min(waiting, key=lambda pair: pair[0])[1].transport.close()
            else:
                self._refuse(503, "too many connections of this address")

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_header()
        else:
            self._header_came()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._header_came()
        super().connection_lost(exc)

    @property
    def waits_since(self) -> tuple[bool, float] | None:
        """Orders the connections that wait for a request: unfinished headers first, the oldest first; None while at work."""
        for idle, timer in ((False, self.header_timer), (True, self.timeout_keep_alive_task)):
            if timer is not None:
                return idle, timer.when()
        return None

    def _shares_address(self, other: BoundedProtocol) -> bool:
        return self.network is not None and self.network == other.network and not self.transport.is_closing()

    def _await_header(self) -> None:
        if self.header_timer is None and not self.transport.is_closing():
            self.header_timer = self.loop.call_later(self.limits.header_seconds, self._header_is_late)

    def _header_came(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _header_is_late(self) -> None:
        self.header_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the header did not come within {self.limits.header_seconds:g} s")

    def _refuse(self, status: int, reason: str) -> None:
        """Answer before there is a request, and close."""
        self._header_came()
        headers = [("content-type", "text/plain; charset=utf-8"), ("connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]),
            h11.Data(data=reason.encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def bounded(limits: Limits) -> type[BoundedProtocol]:
    """The protocol of a server with these limits, for uvicorn's `http`."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})


def network_of(host: str) -> str:
    """What counts as one address: an IPv4 address, or the 64 bits that name a network of IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)
