"""Readable PyTorch references of attention, which kernels are tested against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def attention_chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, chunk: int = 1024) -> Tensor:
    """softmax(q k^T scale + mask) v by online softmax over chunks of keys (Milakov and Gimelshein 2018; Rabe 2021).

    q (B, heads, N, d), k and v (B, heads, M, d); mask (B, 1 or heads, 1 or N, M), boolean (True attends) or additive, or
    None. Computes in float32 (float64 for float64 inputs) and returns the input's dtype. Holds N x chunk scores, never N x M.
    A query without keys gives 0.
    """
    starts = range(0, k.shape[-2], chunk)
    pairs = ((k[..., s : s + chunk, :], v[..., s : s + chunk, :]) for s in starts)
    masks = None if mask is None else (mask[..., s : s + chunk] for s in starts)
    return attention_streamed(q, pairs, scale, masks)


def attention_streamed(
    q: Tensor, pairs: Iterable[tuple[Tensor, Tensor]], scale: float, masks: Iterator[Tensor] | None = None
) -> Tensor:
    """`attention_chunked` over chunks of keys and values (B, heads, m, d) that arrive one after the other."""
    inner = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(inner) * scale
    out = torch.zeros_like(queries)
    largest = torch.full(q.shape[:-1], float("-inf"), dtype=inner, device=q.device)
    total = torch.zeros_like(largest)
    for keys, values in pairs:
        scores = queries @ keys.to(inner).transpose(-1, -2)
        if masks is not None:
            part = next(masks)
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        new = torch.maximum(largest, scores.amax(-1))
        safe = torch.where(new.isinf(), torch.zeros_like(new), new)
        weights = scores.sub_(safe[..., None]).exp_()
        keep = torch.exp(largest - safe)
        total = total * keep + weights.sum(-1)
        out = out.mul_(keep[..., None]).add_(weights @ values.to(inner))
        largest = new
        del scores, weights, keys, values  # make room for the next chunk
    return (out / total.clamp_min(torch.finfo(inner).tiny)[..., None]).to(q.dtype)
