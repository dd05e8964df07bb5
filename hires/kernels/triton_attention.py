"""Flash attention in Triton, forward only, over all keys or windows of a canvas.

Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022); windows by index arithmetic. Only modules that run a kernel
import this one, because it imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hires.kernels.attention_policies import Axis, Windowed, axis
from hires.kernels.tuning import Config


@triton.jit  # type: ignore[untyped-decorator]
def attention_kernel(  # type: ignore[no-untyped-def]
    Q,
    K,
    V,
    MASK,
    OUT,
    qb,
    qh,
    qn,
    qd,
    kb,
    kh,
    kn,
    kd,
    vb,
    vh,
    vn,
    vd,
    ob,
    oh,
    on,
    od,
    mb,
    mh,
    mm,
    heads,
    N,
    M,
    scale,
    canvas_h,
    canvas_w,
    block_h,
    block_w,
    keys_h,
    keys_w,
    margin_h,
    margin_w,
    shift_h,
    shift_w,
    blocks_w,
    tiles,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROUND_H: tl.constexpr,
    ROUND_W: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, BLOCK_V columns of the result; scores over D in pieces of BLOCK_D."""
    tile = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    local = tl.arange(0, BLOCK_M)
    if WINDOWED:
        block = tile // tiles
        a = block // blocks_w
        b = block % blocks_w
        place = (tile % tiles) * BLOCK_M + local
        r = a * block_h + place // block_w
        c = b * block_w + place % block_w
        inside = place < block_h * block_w
        first_h = a * block_h - shift_h - margin_h
        first_w = b * block_w - shift_w - margin_w
        if ROUND_H:
            inside = inside & (r < canvas_h)
            r = (r - shift_h + canvas_h) % canvas_h
            first_h = (first_h + 2 * canvas_h) % canvas_h
        else:
            r = r - shift_h
            inside = inside & (r >= 0) & (r < canvas_h)
            first_h = tl.minimum(tl.maximum(first_h, 0), canvas_h - keys_h)
        if ROUND_W:
            inside = inside & (c < canvas_w)
            c = (c - shift_w + canvas_w) % canvas_w
            first_w = (first_w + 2 * canvas_w) % canvas_w
        else:
            c = c - shift_w
            inside = inside & (c >= 0) & (c < canvas_w)
            first_w = tl.minimum(tl.maximum(first_w, 0), canvas_w - keys_w)
        rows = (r * canvas_w + c).to(tl.int64)
        count = keys_h * keys_w
    else:
        rows = tile.to(tl.int64) * BLOCK_M + local
        inside = rows < N
        count = M
    dims = tl.arange(0, BLOCK_D)
    outs = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    q_at = Q + batch * qb + head * qh + rows[:, None] * qn
    q = tl.load(q_at + dims[None, :] * qd, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(0, count, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        good = j < count
        if WINDOWED:
            kr = first_h + j // keys_w
            kc = first_w + j % keys_w
            if ROUND_H:
                kr = kr % canvas_h
            if ROUND_W:
                kc = kc % canvas_w
            keys = (kr * canvas_w + kc).to(tl.int64)
        else:
            keys = j.to(tl.int64)
        k_at = K + batch * kb + head * kh + keys[None, :] * kn
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in tl.static_range(0, D, BLOCK_D):
            part = dims + d < D
            if d > 0:  # noqa: SIM108 - Triton decides this while compiling
                q_part = tl.load(q_at + (dims + d)[None, :] * qd, mask=inside[:, None] & part[None, :], other=0.0)
            else:
                q_part = q
            k = tl.load(k_at + (dims + d)[:, None] * kd, mask=good[None, :] & part[:, None], other=0.0)
            scores += tl.dot(q_part, k, input_precision="ieee")
        scores = scores * scale
        if MASKED:
            bias = tl.load(MASK + batch * mb + head * mh + keys * mm, mask=good, other=0.0)
            scores += bias[None, :].to(tl.float32)
        scores = tl.where(good[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp(scores - safe[:, None])
        keep = tl.exp(largest - safe)
        total = total * keep + tl.sum(weights, 1)
        v_at = V + batch * vb + head * vh + keys[:, None] * vn + outs[None, :] * vd
        v = tl.load(v_at, mask=good[:, None] & (outs < D)[None, :], other=0.0)
        acc = acc * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = new
    acc = acc / tl.maximum(total, 1e-38)[:, None]
    o_at = OUT + batch * ob + head * oh + rows[:, None] * on + outs[None, :] * od
    tl.store(o_at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & (outs < D)[None, :])


def blocks(d: int) -> tuple[int, int]:
    """BLOCK_D and BLOCK_V for a head size: one piece up to 256, above that pieces of 64 and results of 128."""
    piece = max(16, triton.next_power_of_2(d))
    return (piece, piece) if d <= 256 else (64, 128)


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    config: Config,
    canvas: tuple[int, int] | None = None,
    policy: Windowed | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask) v.

    Args:
        q: (B, heads, N, d), any strides.
        k: (B, heads, M, d), any strides.
        v: (B, heads, M, d), any strides.
        mask: (B, 1 or heads, 1, M), boolean (True attends) or additive.
        scale: factor on the scores.
        config: how to launch the kernel.
        canvas: the rows and columns of the tokens, with a policy.
        policy: the windows; None attends to all keys.
    """
    (batch, heads, n, d), m = q.shape, k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    piece, result = blocks(d)
    rows = cols = Axis(1, 1, 1, 0, 0, False)
    tiles, programs = 1, triton.cdiv(n, config.queries)
    if policy is not None:
        assert canvas is not None
        rows, cols = axis(policy, canvas[0], 0), axis(policy, canvas[1], 1)
        tiles = triton.cdiv(rows.block * cols.block, config.queries)
        programs = rows.count * cols.count * tiles
    bias, strides = _bias(q, mask, m)
    grid = (programs, batch * heads, triton.cdiv(d, result))
    attention_kernel[grid](
        q,
        k,
        v,
        bias,
        out,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride(),
        *strides,
        heads,
        n,
        m,
        float(scale),
        rows.length,
        cols.length,
        rows.block,
        cols.block,
        rows.keys,
        cols.keys,
        rows.margin,
        cols.margin,
        rows.shift,
        cols.shift,
        cols.count,
        tiles,
        D=d,
        BLOCK_D=piece,
        BLOCK_V=result,
        BLOCK_M=config.queries,
        BLOCK_N=config.keys,
        MASKED=mask is not None,
        WINDOWED=policy is not None,
        ROUND_H=rows.circular,
        ROUND_W=cols.circular,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _bias(q: Tensor, mask: Tensor | None, keys: int) -> tuple[Tensor, tuple[int, int, int]]:
    if mask is None:
        return q, (0, 0, 0)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float32, device=q.device).masked_fill(~mask, float("-inf"))
    wide = mask.expand(q.shape[0], q.shape[1], 1, keys)
    return wide, (wide.stride(0), wide.stride(1), wide.stride(3))
