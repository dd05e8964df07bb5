"""Measures every kernel backend on the shapes of real models.

The suites attention and norm of `hires bench`; attention is checked in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.bench.row import BenchSetup, Row, name_of
from hires.bench.timing import Timed, peak_bandwidth, peak_flops, rms
from hires.kernels import group_norm
from hires.kernels.attention_policies import NPA, Global, Policy, attended
from hires.kernels.dispatch import BACKENDS, attention
from hires.kernels.reference import attention_chunked
from hires.tiling.geometry import Size

SAMPLED = 32  # queries of an attention whose result is checked in float64


def attention_rows(setting: BenchSetup) -> Iterator[Row]:
    """Self-attention of CosXL's levels, PixArt's blocks and the autoencoder's mid block, by every backend and policy."""
    dtype = setting.torch_dtype
    layers = (
        ("cosxl level 1", 10, 64, 16, 64),
        ("cosxl level 2", 20, 64, 32, 32),
        ("pixart", 16, 72, 16, 64),
        ("vae", 1, 512, 8, 128),
    )
    for size in setting.of("attention"):
        for case, heads, width, px, window in layers:
            canvas = (max(1, size.height // px), max(1, size.width // px))
            generator = torch.Generator().manual_seed(0)
            shape = (1, canvas[0] * canvas[1], heads, width)
            q, k, v = (torch.randn(shape, generator=generator).to(setting.device, dtype).transpose(1, 2) for _ in range(3))
            policies: tuple[Policy, ...] = (Global(), NPA(window)) if max(canvas) > window else (Global(),)
            for policy in policies:
                picked, exact = _exact_attention(q, k, v, canvas, policy)
                for backend in BACKENDS:
                    yield _attention_row(setting, (case, size, canvas, policy, backend.name), (q, k, v), picked, exact)


def _exact_attention(
    q: Tensor, k: Tensor, v: Tensor, canvas: tuple[int, int], policy: Policy
) -> tuple[list[int], Tensor | None]:
    """Some queries' results over all keys in float64; None under a policy that leaves keys out."""
    count = canvas[0] * canvas[1]
    picked = sorted({(7919 * i + count // 3) % count for i in range(min(SAMPLED, count))})
    if not isinstance(policy, Global):
        return picked, None
    return picked, attention_chunked(q[:, :, picked].double(), k.double(), v.double(), None, q.shape[-1] ** -0.5)


def _attention_row(
    setting: BenchSetup,
    what: tuple[str, Size, tuple[int, int], Policy, str],
    parts: tuple[Tensor, Tensor, Tensor],
    picked: list[int],
    exact: Tensor | None,
) -> Row:
    case, size, canvas, policy, backend = what
    q, k, v = parts

    def run() -> Tensor:
        return attention(q, k, v, canvas=canvas, policy=policy, backend=backend)

    flops = 4.0 * q.shape[1] * q.shape[-1] * attended(policy, canvas)
    ceiling = peak_flops(setting.device, q.dtype)
    row = Row(
        suite="attention",
        case=case,
        way=f"{backend}, {policy}",
        size=str(size),
        dtype=name_of(q.dtype),
        flops=flops,
        moved=4.0 * q.nbytes,
        peak_flops=ceiling,
        peak_bandwidth=peak_bandwidth(setting.device),
        taken=Timed(state=""),
    )
    if flops / ceiling * 5 > (10 if setting.quick else 60):
        return replace(row, taken=Timed(state="skipped: takes too long"))
    taken = setting.time(run)
    if taken.p50 is None:
        return replace(row, taken=taken)
    with torch.inference_mode():
        error = None if exact is None else rms(run()[:, :, picked], exact)
    return replace(
        row,
        taken=taken,
        measured_peak_bytes=setting.peak_of(run),
        measure="rms error" if error is not None else "",
        quality=error,
    )


def norm_rows(setting: BenchSetup) -> Iterator[Row]:
    """GroupNorm's statistics, and scale, shift and SiLU, on maps of the UNet and of the autoencoder's bands."""
    dtype = setting.torch_dtype
    for size in setting.of("norm"):
        for channels, px in ((320, 8), (1280, 32), (512, 8), (128, 1)):
            shape = (1, channels, min(64, max(1, size.height // px)), max(1, size.width // px))
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device, dtype)
            scale, shift = (torch.randn(1, channels, 1, 1, device=setting.device) for _ in range(2))
            for backend in group_norm.STATS:

                def stats(backend: str = backend.name, x: Tensor = x) -> Tensor:
                    statistics = group_norm.group_norm_stats(x, 32, backend=backend)
                    return torch.stack([statistics.mean, statistics.var])

                def apply(backend: str = backend.name, x: Tensor = x, scale: Tensor = scale, shift: Tensor = shift) -> Tensor:
                    return group_norm.group_norm_apply(x, scale, shift, silu=True, backend=backend)

                flat = x.double().reshape(1, 32, -1)
                yield _map_row(
                    setting,
                    "statistics",
                    backend.name,
                    x,
                    stats,
                    torch.stack([flat.mean(-1), flat.var(-1, correction=0)]),
                    x.nbytes,
                )
                exact = F.silu(x.double() * scale.double() + shift.double())
                yield _map_row(setting, "scale, shift, SiLU", backend.name, x, apply, exact, 2 * x.nbytes)


def _map_row(setting: BenchSetup, case: str, way: str, x: Tensor, run: Callable[[], Tensor], exact: Tensor, moved: int) -> Row:
    shape = "x".join(str(side) for side in x.shape)
    row = Row(
        suite="norm",
        case=f"{case} {shape}",
        way=way,
        size=shape,
        dtype=name_of(x.dtype),
        moved=float(moved),
        peak_bandwidth=peak_bandwidth(setting.device),
        taken=setting.time(run),
    )
    if row.taken.p50 is None:
        return row
    with torch.inference_mode():
        return replace(row, measure="rms error", quality=rms(run(), exact), measured_peak_bytes=setting.peak_of(run))
