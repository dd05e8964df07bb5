"""Attention over an ordered tuple of backends: the first whose `why_not` is None runs; a named one runs or says why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.kernels.attention_policies import Global, KVPool, Policy, Windowed
from hires.kernels.backends import Backend, choose, reasons_of
from hires.kernels.probes import (
    ROW_MASKS,
    floating,
    fused_why_not,
    triton_why_not,
    xformers_why_not,
)
from hires.kernels.reference import attention_chunked
from hires.kernels.torch_windows import attend_windows, pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The facts of a call that decide which backends can run it.

    row_mask: the mask differs by query. unit_stride: elements of a head lie side by side in queries, keys and values.
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    masked: bool
    row_mask: bool = False
    unit_stride: bool = True


class Run(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, /) -> Tensor: ...


Reason = Callable[[AttentionSpec], str | None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _forced(kind: str) -> Run:
    """PyTorch's own attention, held to one of its kernels."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, kind)):
            return _sdpa(q, k, v, mask, scale)

    return run


def _triton(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return _triton_windows(q, k, v, mask, scale, None, None)


def _triton_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    canvas: tuple[int, int] | None,
    policy: Windowed | None,
) -> Tensor:
    from hires.kernels.triton_attention import attention_triton
    from hires.kernels.tuning import architecture, config

    chosen = config(q.shape[-1], architecture(q), q.dtype == torch.float32)
    return attention_triton(q, k, v, mask, scale, chosen, canvas, policy)


def _pooled_triton(x: Tensor, canvas: tuple[int, int], r: int) -> Tensor:
    """A pass of its own: attention reads keys and values N / BLOCK_M times, and after this they are r^2 times smaller."""
    from hires.kernels.triton_maps import pool_triton

    return pool_triton(x, canvas, r)


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    parts = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, heads, d)
    return memory_efficient_attention(*parts, scale=scale).transpose(1, 2)  # type: ignore[no-any-return]


def _sdpa_why_not(spec: AttentionSpec) -> str | None:
    if not spec.dtype.is_floating_point:
        return floating(spec.dtype)
    if spec.masked and spec.queries * spec.keys > 2**31:
        return f"a masked call of {spec.queries} x {spec.keys} would hold all scores"
    return None


def _math_why_not(spec: AttentionSpec) -> str | None:
    if spec.queries * spec.keys > ROW_MASKS:
        return f"{spec.queries} x {spec.keys} scores would all be held"
    return floating(spec.dtype)


def _chunked_why_not(spec: AttentionSpec) -> str | None:
    return floating(spec.dtype)


def _fused(kind: str) -> Reason:
    return lambda spec: fused_why_not(kind, spec)


BACKENDS: tuple[Backend[AttentionSpec, Run], ...] = (
    Backend(name="sdpa", why_not=_sdpa_why_not, run=_sdpa),  # PyTorch's own choice; first until a card has run the next two
    Backend(name="xformers", why_not=xformers_why_not, run=_xformers),
    Backend(name="triton", why_not=triton_why_not, run=_triton),
    Backend(name="flash", why_not=_fused("FLASH_ATTENTION"), run=_forced("FLASH_ATTENTION")),
    Backend(name="efficient", why_not=_fused("EFFICIENT_ATTENTION"), run=_forced("EFFICIENT_ATTENTION")),
    Backend(name="cudnn", why_not=_fused("CUDNN_ATTENTION"), run=_forced("CUDNN_ATTENTION")),
    Backend(name="math", why_not=_math_why_not, run=_forced("MATH")),
    Backend(name="chunked", why_not=_chunked_why_not, run=attention_chunked),
)


def spec_of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AttentionSpec:
    """The facts of a call."""
    return AttentionSpec(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        queries=q.shape[-2],
        keys=k.shape[-2],
        masked=mask is not None,
        row_mask=mask is not None and mask.shape[-2] > 1,
        unit_stride=all(x.stride(-1) == 1 for x in (q, k, v)),
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    canvas: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    policy: Policy = Global(),  # noqa: B008 - a frozen value
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask) v; q (B, heads, N, d), k and v (B, heads, M, d), scale 1/sqrt(d) unless given.

    policy: which keys a query attends to; all but `Global` need `canvas`, the rows and columns of N = M = h w tokens, and
    take masks by key only (`KVPool` none). mask: (B, 1 or heads, 1 or N, M), boolean (True attends) or additive.
    BackendRefused with the reason where the named backend, or every backend, cannot run the call; ValueError where the
    policy cannot.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(policy, Global):
        return select(spec_of(q, k, v, mask), backend).run(q, k, v, mask, factor * policy.stretch(q.shape[-2]))
    canvas = _checked(q, k, mask, canvas, policy)
    kernel = select(spec_of(q, k, v, mask), backend).name == "triton"
    if isinstance(policy, KVPool):
        thin = _pooled_triton if kernel else pooled
        return attention(q, thin(k, canvas, policy.r), thin(v, canvas, policy.r), mask=mask, scale=factor, backend=backend)
    if kernel:
        return _triton_windows(q, k, v, mask, factor, canvas, policy)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, part: Tensor | None) -> Tensor:
        return attention(queries, keys, values, mask=part, scale=factor, backend=backend)

    return attend_windows(q, k, v, mask, canvas, policy, attend)


def _checked(
    q: Tensor, k: Tensor, mask: Tensor | None, canvas: tuple[int, int] | None, policy: Windowed | KVPool
) -> tuple[int, int]:
    if canvas is None:
        raise ValueError(f"{policy} needs the canvas: the rows and columns of its {q.shape[-2]} tokens")
    if canvas[0] * canvas[1] != q.shape[-2] or k.shape[-2] != q.shape[-2]:
        raise ValueError(f"{policy}: a canvas of {canvas} is not {q.shape[-2]} queries and {k.shape[-2]} keys")
    if mask is not None and (isinstance(policy, KVPool) or mask.shape[-2] > 1):
        raise ValueError(f"{policy} takes no mask of shape {tuple(mask.shape)}")
    return canvas


def select(spec: AttentionSpec, name: str | None = None) -> Backend[AttentionSpec, Run]:
    """The first backend that runs the call, or the named one. BackendRefused says why where there is none."""
    return choose(BACKENDS, spec, "attention", name)


def table(spec: AttentionSpec) -> list[tuple[str, str | None]]:
    """Every backend in order with its reason, None where it runs."""
    return reasons_of(BACKENDS, spec)
