"""Attention policies in PyTorch: windows, pooled keys, and a masked reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.kernels.attention_policies import Axis, Global, KVPool, Policy, Windowed, axis

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend_windows(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, canvas: tuple[int, int], policy: Windowed, attend: Attend
) -> Tensor:
    """Attention of each block of queries over its window of keys, one row of blocks at a time.

    Args:
        q: (B, heads, h w, d).
        k: as q.
        v: as q.
        mask: (B, 1 or heads, 1, h w) or None.
        canvas: (h, w).
        policy: the windows.
        attend: attention of a batch of blocks; the blocks of a row are one batch of (w / block) keys^2 tokens.
    """
    rows, cols = axis(policy, canvas[0], 0), axis(policy, canvas[1], 1)
    out = _split(torch.empty_like(q, memory_format=torch.contiguous_format), 2, canvas)
    q, k, v = (_split(x, 2, canvas) for x in (q, k, v))
    mask = None if mask is None else _split(mask, 3, canvas).movedim(2, -1)  # (B, 1 or heads, h, w, 1)
    for a in range(rows.count):
        lines, window = (torch.tensor(part, device=q.device) for part in (query_lines(rows, a), key_lines(rows, a)))
        part = None if mask is None else mask.index_select(2, window)
        picked = q.index_select(2, lines), k.index_select(2, window), v.index_select(2, window)
        out[:, :, lines] = attend_across(*picked, part, cols, attend)
    return out.flatten(2, 3)


def attend_across(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cols: Axis, attend: Attend) -> Tensor:
    """Attention of one row of blocks: queries (B, heads, lines, w, d) over their window's keys (B, heads, rows, w, d).

    mask: (B, 1 or heads, rows, w, 1) or None. The result has the shape of q.
    """
    lines, device = q.shape[2], q.device
    reads = _keys(cols).to(device)
    queries = _blocks(q, _queries(cols).to(device))
    part = None if mask is None else _blocks(mask, reads).transpose(-1, -2)
    mixed = attend(queries, _blocks(k, reads), _blocks(v, reads), part)
    mixed = _split(_split(mixed, 0, (q.shape[0], cols.count)), 3, (lines, cols.block))
    mixed = mixed.permute(0, 2, 3, 1, 4, 5).flatten(3, 4)  # (B, heads, lines, count block, d)
    return mixed.index_select(3, _back(cols).to(device))


def _split(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    """One dimension as several (a typed unflatten)."""
    parts: Tensor = x.unflatten(dim, sizes)  # type: ignore[no-untyped-call]
    return parts


def _blocks(x: Tensor, columns: Tensor) -> Tensor:
    """(B, heads, lines, w, d) to (B count, heads, lines columns, d)."""
    picked = _split(x.index_select(3, columns.flatten()), 3, tuple(columns.shape)).permute(0, 3, 1, 2, 4, 5)
    return picked.flatten(3, 4).flatten(0, 1)


def query_lines(along: Axis, index: int) -> list[int]:
    """The tokens of a block of queries that lie on the axis."""
    start = index * along.block - along.shift
    if along.circular:
        return [i % along.length for i in range(start, min(start + along.block, along.length - along.shift))]
    return list(range(max(0, start), min(start + along.block, along.length)))


def key_lines(along: Axis, index: int) -> list[int]:
    """The tokens that a block of queries attends to."""
    start = along.key_start(index)
    return [i % along.length for i in range(start, start + along.keys)]


def _queries(along: Axis) -> Tensor:
    """The query tokens of every block, (count, block), clamped to the axis at its ends."""
    places = torch.arange(along.count * along.block)
    places = places.clamp(max=along.length - 1) - along.shift if along.circular else places - along.shift
    places = places % along.length if along.circular else places.clamp(0, along.length - 1)
    return places.reshape(along.count, along.block)


def _keys(along: Axis) -> Tensor:
    """The key tokens of every block, (count, keys)."""
    return torch.tensor([key_lines(along, index) for index in range(along.count)])


def _back(along: Axis) -> Tensor:
    """The position of each token of the axis in the flattened blocks."""
    places = torch.arange(along.length) + along.shift
    return places % along.length if along.circular else places


def pooled(x: Tensor, canvas: tuple[int, int], r: int) -> Tensor:
    """Means over r x r tokens: (B, heads, h w, d) to (B, heads, ceil(h / r) ceil(w / r), d).

    The last row and column are repeated if r does not divide h and w.
    """
    h, w = canvas
    maps = x.transpose(2, 3).reshape(-1, x.shape[-1], h, w)
    if h % r or w % r:
        maps = F.pad(maps, (0, -w % r, 0, -h % r), mode="replicate")
    return _split(F.avg_pool2d(maps, r).flatten(2).transpose(1, 2).contiguous(), 0, x.shape[:2])


def policy_mask(policy: Windowed, canvas: tuple[int, int]) -> Tensor:
    """Whether each of h w queries attends to each of h w keys, bool (h w, h w): the definition, for tests."""
    rows, cols = (_axis_mask(axis(policy, n, i)) for i, n in enumerate(canvas))
    return (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2).flatten(0, 1)


def _axis_mask(along: Axis) -> Tensor:
    keep = torch.zeros(along.length, along.length, dtype=torch.bool)
    for i in range(along.length):
        place = (i + along.shift) % along.length if along.circular else i + along.shift
        keep[i, key_lines(along, place // along.block)] = True
    return keep


def attention_masked(q: Tensor, k: Tensor, v: Tensor, canvas: tuple[int, int], policy: Policy, scale: float) -> Tensor:
    """The reference of every policy, in float64 with all scores at once."""
    q, k, v = q.double(), k.double(), v.double()
    if isinstance(policy, KVPool):
        k, v = pooled(k, canvas, policy.r), pooled(v, canvas, policy.r)
    scores = q @ k.transpose(-1, -2) * scale
    if not isinstance(policy, Global | KVPool):
        scores = scores.masked_fill(~policy_mask(policy, canvas), float("-inf"))
    return scores.softmax(-1) @ v
