"""Readable PyTorch references that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_chunked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, chunk: int = 1024) -> Tensor:
    """softmax(q k^T scale + mask) v by online softmax over chunks of keys (Milakov and Gimelshein 2018; Rabe 2021).

    q (B, heads, N, d), k and v (B, heads, M, d); mask (B, 1 or heads, 1 or N, M), boolean (True attends) or additive, or
    None. float32 (float64 for float64 inputs) inside, the input's dtype out. Never holds N x M scores, only N x chunk.
    A query that attends to nothing gives 0.
    """
    inner = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.to(inner) * scale
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=inner, device=q.device)
    largest = torch.full(q.shape[:-1], float("-inf"), dtype=inner, device=q.device)
    total = torch.zeros_like(largest)
    for start in range(0, k.shape[-2], chunk):
        keys, values = (t[..., start : start + chunk, :].to(inner) for t in (k, v))
        scores = queries @ keys.transpose(-1, -2)
        if mask is not None:
            part = mask[..., start : start + chunk]
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        new = torch.maximum(largest, scores.amax(-1))
        safe = torch.where(new.isinf(), torch.zeros_like(new), new)
        weights = torch.exp(scores - safe[..., None])
        keep = torch.exp(largest - safe)
        total = total * keep + weights.sum(-1)
        out = out * keep[..., None] + weights @ values
        largest = new
    return (out / total.clamp_min(torch.finfo(inner).tiny)[..., None]).to(q.dtype)
