"""Attention over an ordered tuple of backends; the first one that can runs it."""

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
    """The facts of a call that decide which backends can run it."""

    device: str
    """The type of the device, such as 'cuda'."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    head_dim: int
    """The size of a head."""
    queries: int
    """The number of queries."""
    keys: int
    """The number of keys."""
    masked: bool
    """Whether there is a mask."""
    row_mask: bool = False
    """Whether the mask differs between queries."""
    unit_stride: bool = True
    """Whether the elements of a head are contiguous in queries, keys and values."""


class Run(Protocol):
    """A backend's function."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, /) -> Tensor:
        """softmax(q k^T scale + mask) v; shapes as in `attention`."""
        ...


Reason = Callable[[AttentionSpec], str | None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _sdpa_kernel(kind: str) -> Run:
    """PyTorch's own attention, restricted to one of its kernels."""

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
    """Pooling pays as a separate pass: attention reads keys and values N / BLOCK_M times, and now they are r^2 times fewer."""
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
    Backend(name="sdpa", why_not=_sdpa_why_not, run=_sdpa),  # PyTorch's own choice; first until the next two are measured
    Backend(name="xformers", why_not=xformers_why_not, run=_xformers),
    Backend(name="triton", why_not=triton_why_not, run=_triton),
    Backend(name="flash", why_not=_fused("FLASH_ATTENTION"), run=_sdpa_kernel("FLASH_ATTENTION")),
    Backend(name="efficient", why_not=_fused("EFFICIENT_ATTENTION"), run=_sdpa_kernel("EFFICIENT_ATTENTION")),
    Backend(name="cudnn", why_not=_fused("CUDNN_ATTENTION"), run=_sdpa_kernel("CUDNN_ATTENTION")),
    Backend(name="math", why_not=_math_why_not, run=_sdpa_kernel("MATH")),
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
    """softmax(q k^T scale + mask) v.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, M, d).
        v: (B, heads, M, d).
        canvas: the rows and columns of N = M = h w tokens; all policies but `Global` need it.
        mask: (B, 1 or heads, 1 or N, M), boolean (True attends) or additive. With a windowed policy only masks by key,
            (B, 1 or heads, 1, M); with `KVPool` none.
        scale: 1/sqrt(d) by default.
        policy: which keys each query attends to.
        backend: the backend that must run; None chooses one.

    BackendRefused, with the reasons, if the named backend, or every backend, cannot run the call; ValueError if the canvas or
    the mask does not suit the policy.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(policy, Global):
        return select(spec_of(q, k, v, mask), backend).run(q, k, v, mask, factor * policy.stretch(q.shape[-2]))
    canvas = _checked(q, k, mask, canvas, policy)
    by_triton = select(spec_of(q, k, v, mask), backend).name == "triton"
    if isinstance(policy, KVPool):
        pool = _pooled_triton if by_triton else pooled
        return attention(q, pool(k, canvas, policy.r), pool(v, canvas, policy.r), mask=mask, scale=factor, backend=backend)
    if by_triton:
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
    """The first backend that can run the call, or the named one. BackendRefused, with the reasons, if there is none."""
    return choose(BACKENDS, spec, "attention", name)


def table(spec: AttentionSpec) -> list[tuple[str, str | None]]:
    """Every backend in order with the reason why it cannot run the call; None if it can."""
    return reasons_of(BACKENDS, spec)
