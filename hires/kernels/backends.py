"""What every dispatch shares: an ordered tuple of ways to compute the same thing, each of which says why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Spec = TypeVar("Spec")
Run = TypeVar("Run")


class BackendRefused(Exception):
    """A backend that was asked for by name cannot run this call; the message is its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(Generic[Spec, Run]):
    """A way to compute something. `why_not(spec)` is None where it runs, else the reason."""

    name: str
    why_not: Callable[[Spec], str | None]
    run: Run


def choose(backends: Sequence[Backend[Spec, Run]], spec: Spec, what: str, name: str | None = None) -> Backend[Spec, Run]:
    """The first backend that runs the call, or the named one. BackendRefused says why where there is none.

    what: the kind of backends, for the message.
    """
    if name is not None:
        chosen = next((backend for backend in backends if backend.name == name), None)
        if chosen is None:
            raise BackendRefused(f"no {what} backend {name!r}; known: {', '.join(b.name for b in backends)}")
        reason = chosen.why_not(spec)
        if reason is not None:
            raise BackendRefused(f"{what} backend {name}: {reason}")
        return chosen
    reasons = reasons_of(backends, spec)
    for backend, (_, reason) in zip(backends, reasons, strict=True):
        if reason is None:
            return backend
    raise BackendRefused(f"no {what} backend runs this call: " + "; ".join(f"{n}: {r}" for n, r in reasons))


def reasons_of(backends: Sequence[Backend[Spec, Run]], spec: Spec) -> list[tuple[str, str | None]]:
    """Every backend in order with its reason, None where it runs."""
    return [(backend.name, backend.why_not(spec)) for backend in backends]
