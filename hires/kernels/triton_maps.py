"""Triton kernels on maps: group norm, blending, rounding to integers, pooling.

Maps are (B, C, rows, W) of any strides. A program takes a block of positions and all channels of a group, or a power of two
of them. Positions of one band are 32-bit integers, which divide fast; offsets are 64-bit. Only modules that run a kernel
import this one, because it imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hires.kernels.tuning import launch

MOST_POSITIONS = 2**31 - 2**14  # of one band, with room for the last block to overshoot
MOST_PIECES = 1024  # of one group of one picture; each has its own moments


@triton.jit  # type: ignore[untyped-decorator]
def stats_kernel(  # type: ignore[no-untyped-def]
    X,
    COUNT,
    MEAN,
    SQUARES,
    xb,
    xc,
    xr,
    xw,
    groups,
    W,
    positions,
    per_piece,
    pieces,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Count, mean and summed squared distances of one piece of a group; blocks are merged by Chan's formula."""
    piece = tl.program_id(0)
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    base = X + batch * xb + (group * CHANNELS + channel.to(tl.int64))[None, :] * xc
    first = piece * per_piece
    last = tl.minimum(first + per_piece, positions)
    count = 0.0
    mean = 0.0
    squares = 0.0
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        keep = (p < last)[:, None] & (channel < CHANNELS)[None, :]
        x = tl.load(base + (p // W).to(tl.int64)[:, None] * xr + (p % W).to(tl.int64)[:, None] * xw, mask=keep, other=0.0).to(
            tl.float32
        )
        n = (tl.minimum(last - start, BLOCK_P) * CHANNELS).to(tl.float32)
        centre = tl.sum(tl.sum(x, 1), 0) / n
        away = tl.where(keep, x - centre, 0.0)
        around = tl.sum(tl.sum(away * away, 1), 0)
        delta = centre - mean
        total = count + n
        mean += delta * (n / total)
        squares += around + delta * delta * (count * n / total)
        count = total
    at = tl.program_id(1).to(tl.int64) * pieces + piece
    tl.store(COUNT + at, count)
    tl.store(MEAN + at, mean)
    tl.store(SQUARES + at, squares)


@triton.jit  # type: ignore[untyped-decorator]
def apply_kernel(  # type: ignore[no-untyped-def]
    X,
    SCALE,
    SHIFT,
    OUT,
    xb,
    xc,
    xr,
    xw,
    ob,
    oc,
    orow,
    ow,
    channels,
    W,
    positions,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
):
    """OUT = silu(X scale + shift), in float32, rounded once."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    keep = (p < positions)[:, None] & (channel < channels)[None, :]
    row, col = (p // W).to(tl.int64)[:, None], (p % W).to(tl.int64)[:, None]
    x = tl.load(X + batch * xb + channel[None, :] * xc + row * xr + col * xw, mask=keep, other=0.0).to(tl.float32)
    scale = tl.load(SCALE + batch * channels + channel, mask=channel < channels, other=0.0)
    shift = tl.load(SHIFT + batch * channels + channel, mask=channel < channels, other=0.0)
    y = x * scale[None, :] + shift[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = OUT + batch * ob + channel[None, :] * oc + row * orow + col * ow
    tl.store(at, y.to(OUT.dtype.element_ty), mask=keep)


@triton.jit  # type: ignore[untyped-decorator]
def accumulate_kernel(  # type: ignore[no-untyped-def]
    CANVAS,
    TILE,
    ROWS,
    COLS,
    cb,
    cc,
    cr,
    cw,
    tb,
    tc,
    tr,
    tw,
    channels,
    W,
    positions,
    BLOCK_P: tl.constexpr,
):
    """CANVAS += rows cols TILE; CANVAS points to the tile's first cell. Every cell belongs to one program: no atomics."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    batch = (tl.program_id(1) // channels).to(tl.int64)
    channel = (tl.program_id(1) % channels).to(tl.int64)
    keep = p < positions
    row, col = (p // W).to(tl.int64), (p % W).to(tl.int64)
    weight = tl.load(ROWS + row, mask=keep, other=0.0) * tl.load(COLS + col, mask=keep, other=0.0)
    tile = tl.load(TILE + batch * tb + channel * tc + row * tr + col * tw, mask=keep, other=0.0).to(tl.float32)
    at = CANVAS + batch * cb + channel * cc + row * cr + col * cw
    tl.store(at, tl.load(at, mask=keep, other=0.0) + weight * tile, mask=keep)


@triton.jit  # type: ignore[untyped-decorator]
def integers_kernel(  # type: ignore[no-untyped-def]
    BAND, OUT, bc, br, bw, W, positions, half, most, BLOCK_P: tl.constexpr
):
    """OUT[row, col, channel] = floor(clip(x half + half, 0, most) + 1 / 2): interleaved, one channel a program."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1).to(tl.int64)
    keep = p < positions
    x = tl.load(BAND + channel * bc + (p // W).to(tl.int64) * br + (p % W).to(tl.int64) * bw, mask=keep, other=0.0).to(
        tl.float32
    )
    whole = (tl.minimum(tl.maximum(x * half + half, 0.0), most) + 0.5).to(tl.int32)
    tl.store(OUT + p.to(tl.int64) * 3 + channel, whole.to(OUT.dtype.element_ty), mask=keep)


@triton.jit  # type: ignore[untyped-decorator]
def pool_kernel(  # type: ignore[no-untyped-def]
    X,
    OUT,
    xb,
    xh,
    xn,
    xd,
    heads,
    rows,
    width,
    small_width,
    count,
    D,
    R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Means over R x R tokens of a canvas, its last row and column repeated; OUT is contiguous (B, heads, count, D)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    keep = (m < count)[:, None] & (dim < D)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.static_range(R * R):
        row = tl.minimum((m // small_width) * R + i // R, rows - 1)
        col = tl.minimum((m % small_width) * R + i % R, width - 1)
        token = (row * width + col).to(tl.int64)
        at = X + batch * xb + head * xh + token[:, None] * xn + dim.to(tl.int64)[None, :] * xd
        total += tl.load(at, mask=keep, other=0.0).to(tl.float32)
    place = (tl.program_id(1).to(tl.int64) * count + m.to(tl.int64))[:, None] * D + dim[None, :]
    tl.store(OUT + place, (total / (R * R)).to(OUT.dtype.element_ty), mask=keep)


def _checked(x: Tensor) -> Tensor:
    assert x.shape[-2] * x.shape[-1] <= MOST_POSITIONS, f"a band of {tuple(x.shape)} has more positions than 32 bits count"
    return x


def stats_triton(band: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and summed squared distances (B, groups, pieces), float32."""
    (batch, channels, rows, width), chosen = _checked(band).shape, launch("group_norm_stats", band)
    per_group, positions = channels // groups, rows * width
    block_c = triton.next_power_of_2(per_group)
    block = max(16, chosen.elements // block_c)
    pieces = min(MOST_PIECES, triton.cdiv(positions, block))
    per_piece = triton.cdiv(triton.cdiv(positions, pieces), block) * block
    pieces = triton.cdiv(positions, per_piece)
    count, mean, squares = (torch.empty(batch, groups, pieces, dtype=torch.float32, device=band.device) for _ in range(3))
    grid = (pieces, batch * groups)
    stats_kernel[grid](
        band,
        count,
        mean,
        squares,
        *band.stride(),
        groups,
        width,
        positions,
        per_piece,
        pieces,
        CHANNELS=per_group,
        BLOCK_C=block_c,
        BLOCK_P=block,
        num_warps=chosen.warps,
    )
    return count, mean, squares


def apply_triton(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, dtype: torch.dtype) -> Tensor:
    """X scale + shift, then SiLU if `silu`; the result keeps the memory format of x."""
    (batch, channels, rows, width), chosen = _checked(x).shape, launch("group_norm_apply", x)
    out = torch.empty_like(x, dtype=dtype)
    block_c = min(triton.next_power_of_2(channels), chosen.channels_last if x.stride(1) == 1 else 1)
    block = max(16, chosen.elements // block_c)
    grid = (triton.cdiv(rows * width, block), triton.cdiv(channels, block_c), batch)
    flat = (t.expand(batch, channels, 1, 1).reshape(batch, channels).float().contiguous() for t in (scale, shift))
    apply_kernel[grid](
        x,
        *flat,
        out,
        *x.stride(),
        *out.stride(),
        channels,
        width,
        rows * width,
        BLOCK_C=block_c,
        BLOCK_P=block,
        SILU=silu,
        num_warps=chosen.warps,
    )
    return out


def accumulate_triton(canvas: Tensor, tile: Tensor, rows: Tensor, cols: Tensor, top: int, left: int) -> None:
    """Add the weighted tile to the canvas in place."""
    (batch, channels, height, width), chosen = _checked(tile).shape, launch("blend", tile)
    grid = (triton.cdiv(height * width, chosen.elements), batch * channels)
    accumulate_kernel[grid](
        canvas[..., top:, left:],
        tile,
        rows.contiguous(),
        cols.contiguous(),
        *canvas.stride(),
        *tile.stride(),
        channels,
        width,
        height * width,
        BLOCK_P=chosen.elements,
        num_warps=chosen.warps,
    )


def to_integers_triton(band: Tensor, bits: int) -> Tensor:
    """Rows (3, rows, W) in [-1, 1] as (rows, W, 3) integers."""
    (channels, rows, width), chosen = _checked(band).shape, launch("integers", band)
    assert channels == 3, "three channels are interleaved"
    levels = 2**bits - 1
    out = torch.empty(rows, width, 3, dtype=torch.uint8 if bits == 8 else torch.uint16, device=band.device)
    grid = (triton.cdiv(rows * width, chosen.elements), channels)
    integers_kernel[grid](
        band,
        out,
        *band.stride(),
        width,
        rows * width,
        levels / 2,
        float(levels),
        BLOCK_P=chosen.elements,
        num_warps=chosen.warps,
    )
    return out


def pool_triton(x: Tensor, canvas: tuple[int, int], r: int) -> Tensor:
    """Means over r x r tokens: (B, heads, h w, d) of any strides to (B, heads, ceil(h / r) ceil(w / r), d)."""
    (batch, heads, _, d), (rows, width), chosen = x.shape, canvas, launch("pool", x)
    small = triton.cdiv(rows, r), triton.cdiv(width, r)
    count, block_d = small[0] * small[1], triton.next_power_of_2(d)
    block = max(1, chosen.elements // block_d)
    out = torch.empty(batch, heads, count, d, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(count, block), batch * heads)
    pool_kernel[grid](
        x,
        out,
        *x.stride(),
        heads,
        rows,
        width,
        small[1],
        count,
        d,
        R=r,
        BLOCK_D=block_d,
        BLOCK_M=block,
        num_warps=chosen.warps,
    )
    return out
