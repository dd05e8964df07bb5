"""What a server refuses besides what the engine does, and the status that every error is answered with."""

from __future__ import annotations

from hires.errors import HiresError, RequestError, WriteError


class QueueFullError(HiresError):
    """No room for another job."""


class ConflictError(HiresError):
    """A job of this id is there and is another."""


STATUS: tuple[tuple[type[HiresError], int], ...] = (
    (QueueFullError, 429),
    (ConflictError, 409),
    (RequestError, 400),
    (WriteError, 507),
)


def http_status(error: BaseException) -> int:
    """The status that an error is answered with; 500 where it is the server's own."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)
