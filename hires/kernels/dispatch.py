"""Attention over an ordered tuple of backends: the first whose `why_not` is None runs; a named one runs or says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.kernels.reference import attention_chunked


class BackendRefused(Exception):
    """A backend that was asked for by name cannot run this call; the message is its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The facts of a call that decide which backends can run it."""

    device: str
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    masked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A way to compute attention. `why_not(spec)` is None where it runs, else the reason."""

    name: str
    why_not: Callable[[AttentionSpec], str | None]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _sdpa_why_not(spec: AttentionSpec) -> str | None:
    if not spec.dtype.is_floating_point:
        return f"takes floating-point tensors, not {spec.dtype}"
    if spec.masked and spec.queries * spec.keys > 2**31:
        return f"a masked call of {spec.queries} x {spec.keys} would hold all scores"
    return None


def _chunked_why_not(spec: AttentionSpec) -> str | None:
    return None if spec.dtype.is_floating_point else f"takes floating-point tensors, not {spec.dtype}"


BACKENDS: tuple[Backend, ...] = (
    Backend(name="sdpa", why_not=_sdpa_why_not, run=_sdpa),
    Backend(name="chunked", why_not=_chunked_why_not, run=attention_chunked),
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """softmax(q k^T scale + mask) v; q (B, heads, N, d), k and v (B, heads, M, d), scale 1/sqrt(d) unless given.

    BackendRefused with the reason where the named backend, or every backend, cannot run the call.
    """
    spec = AttentionSpec(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        queries=q.shape[-2],
        keys=k.shape[-2],
        masked=mask is not None,
    )
    return select(spec, backend).run(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def select(spec: AttentionSpec, name: str | None = None) -> Backend:
    """The first backend that runs the call, or the named one. BackendRefused says why where there is none."""
    if name is not None:
        chosen = next((b for b in BACKENDS if b.name == name), None)
        if chosen is None:
            raise BackendRefused(f"no attention backend {name!r}; known: {', '.join(b.name for b in BACKENDS)}")
        reason = chosen.why_not(spec)
        if reason is not None:
            raise BackendRefused(f"attention backend {name}: {reason}")
        return chosen
    reasons = table(spec)
    for backend, (_, reason) in zip(BACKENDS, reasons, strict=True):
        if reason is None:
            return backend
    raise BackendRefused("no attention backend runs this call: " + "; ".join(f"{n}: {r}" for n, r in reasons))


def table(spec: AttentionSpec) -> list[tuple[str, str | None]]:
    """Every backend in order with its reason, None where it runs."""
    return [(backend.name, backend.why_not(spec)) for backend in BACKENDS]
