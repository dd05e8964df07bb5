"""Dispatch over an ordered tuple of backends that explain why they cannot run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Spec = TypeVar("Spec")
Run = TypeVar("Run")


class BackendRefused(Exception):
    """The named backend, or every backend, cannot run this call; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(Generic[Spec, Run]):
    """One way to compute something."""

    name: str
    """The name that users choose it by."""
    why_not: Callable[[Spec], str | None]
    """The reason why it cannot run a call; None if it can."""
    run: Run
    """The function."""


def choose(backends: Sequence[Backend[Spec, Run]], spec: Spec, what: str, name: str | None = None) -> Backend[Spec, Run]:
    """The first backend that can run the call, or the named one. BackendRefused, with the reasons, if there is none.

    what: the kind of backends, for the message.
    """
    if name is not None:
        named = next((backend for backend in backends if backend.name == name), None)
        if named is None:
            raise BackendRefused(f"no {what} backend {name!r}; known: {', '.join(b.name for b in backends)}")
        reason = named.why_not(spec)
        if reason is not None:
            raise BackendRefused(f"{what} backend {name}: {reason}")
        return named
    reasons = reasons_of(backends, spec)
    for backend, (_, reason) in zip(backends, reasons, strict=True):
        if reason is None:
            return backend
    raise BackendRefused(f"no {what} backend runs this call: " + "; ".join(f"{n}: {r}" for n, r in reasons))


def reasons_of(backends: Sequence[Backend[Spec, Run]], spec: Spec) -> list[tuple[str, str | None]]:
    """Every backend in order with the reason why it cannot run the call; None if it can."""
    return [(backend.name, backend.why_not(spec)) for backend in backends]
