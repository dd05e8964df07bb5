"""Errors of the server alone, and the HTTP status of every error."""

from __future__ import annotations

from hires.errors import HiresError, RequestError, WriteError


class QueueFullError(HiresError):
    """The queue has no room for another job."""


class ConflictError(HiresError):
    """Another job has this id."""


STATUS: tuple[tuple[type[HiresError], int], ...] = (
    (QueueFullError, 429),
    (ConflictError, 409),
    (RequestError, 400),
    (WriteError, 507),
)


def http_status(error: BaseException) -> int:
    """The HTTP status of the answer to an error; 500 where the error is the server's own."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)
