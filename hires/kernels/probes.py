"""Reasons why a backend cannot run a call: its facts, or a failed probe call."""

from __future__ import annotations

import functools
import importlib.util
from typing import Protocol

import torch

ROW_MASKS = 2**31  # the most scores to hold at once
TRITON_HEAD = 512  # the largest head size of the Triton kernel
TRITON_SINGLE_HEAD = 256  # the same in float32
HALVES = (torch.float16, torch.bfloat16)


class Facts(Protocol):
    """The fields of `dispatch.AttentionSpec`, which is defined above this module."""

    @property
    def device(self) -> str:
        """The type of the device, such as 'cuda'."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, keys and values."""
        ...

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        ...

    @property
    def queries(self) -> int:
        """The number of queries."""
        ...

    @property
    def keys(self) -> int:
        """The number of keys."""
        ...

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        ...

    @property
    def row_mask(self) -> bool:
        """Whether the mask differs between queries."""
        ...

    @property
    def unit_stride(self) -> bool:
        """Whether the elements of a head are contiguous."""
        ...


def floating(dtype: torch.dtype) -> str | None:
    """None for a floating-point dtype, else the reason."""
    return None if dtype.is_floating_point else f"takes floating-point tensors, not {dtype}"


def fused_why_not(kind: str, spec: Facts) -> str | None:
    """Why one of PyTorch's fused kernels cannot run; a probe call decides what the facts leave open."""
    if not spec.dtype.is_floating_point:
        return floating(spec.dtype)
    if spec.device == "cpu" and kind != "FLASH_ATTENTION":
        return "runs on CUDA, not on cpu"
    if not spec.unit_stride:
        return "elements of a head do not lie side by side"
    if spec.masked and spec.queries * spec.keys > ROW_MASKS:
        return f"a masked call of {spec.queries} x {spec.keys} would hold all scores"
    return _probe(kind, spec.device, spec.dtype, spec.head_dim, spec.masked)


@functools.cache
def _probe(kind: str, device: str, dtype: torch.dtype, head_dim: int, masked: bool) -> str | None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.zeros(1, 1, 8, head_dim, device=device, dtype=dtype)
    mask = torch.zeros(1, 1, 1, 8, device=device, dtype=dtype) if masked else None
    try:
        with sdpa_kernel(getattr(SDPBackend, kind)):
            torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    except RuntimeError as error:
        return f"PyTorch refuses a probe with heads of {head_dim} in {dtype}: {str(error).splitlines()[0]}"
    return None


def triton_why_not(spec: Facts) -> str | None:
    """Why the Triton attention kernel cannot run."""
    if spec.device != "cuda":
        return f"runs on CUDA, not on {spec.device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if spec.dtype not in (*HALVES, torch.float32):
        return f"takes float16, bfloat16 and float32, not {spec.dtype}"
    if spec.head_dim > TRITON_HEAD:
        return f"heads of {spec.head_dim} are above {TRITON_HEAD}"
    if spec.dtype == torch.float32 and spec.head_dim > TRITON_SINGLE_HEAD:
        return f"float32 heads of {spec.head_dim}: above {TRITON_SINGLE_HEAD} what does not spill computes every score 16 times"
    return "masks by query are not taken, only by key" if spec.row_mask else None


def elementwise_why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels on maps cannot run."""
    if device != "cuda":
        return f"runs on CUDA, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if dtype in (*HALVES, torch.float32) else f"takes float16, bfloat16 and float32, not {dtype}"


def xformers_why_not(spec: Facts) -> str | None:
    """Why xformers cannot run; a probe call decides what the facts leave open."""
    if spec.device != "cuda":
        return f"runs on CUDA, not on {spec.device}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if spec.dtype not in (*HALVES, torch.float32):
        return f"takes float16, bfloat16 and float32, not {spec.dtype}"
    if spec.masked:
        return "masks are left to the other backends"
    if spec.head_dim % 8:
        return f"heads of {spec.head_dim} are not a multiple of 8"
    return _xformers_probe(spec.device, spec.dtype, spec.head_dim)


@functools.cache
def _xformers_probe(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    q = torch.zeros(1, 1, 1, head_dim, device=device, dtype=dtype)
    try:
        from xformers.ops import memory_efficient_attention

        memory_efficient_attention(q, q, q)
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        return f"a probe call fails: {str(error).splitlines()[0]}"
    return None
