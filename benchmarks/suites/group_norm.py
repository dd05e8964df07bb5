"""`python -m benchmarks group_norm`: statistics, and scale-shift-SiLU, on the maps of the SDXL UNet and autoencoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.suites.maps import Job, bench
from hires.kernels.group_norm import STATS, group_norm_apply, group_norm_stats

GROUPS = 32
BAND_ROWS = 64  # as the autoencoder's bands are


def shapes(side: int) -> Iterator[tuple[int, int, int, int]]:
    """The UNet's maps at its three levels, and bands of the autoencoder's four."""
    for channels, scale in ((320, 8), (640, 16), (1280, 32)):
        yield 1, channels, max(1, side // scale), max(1, side // scale)
    for channels, scale in ((512, 8), (512, 4), (256, 2), (128, 1)):
        yield 1, channels, min(BAND_ROWS, side // scale), side // scale


def jobs(side: int, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    for shape in shapes(side):
        x = torch.randn(shape, device=device, dtype=dtype)
        layouts = {"": x, ", channels last": x.contiguous(memory_format=torch.channels_last)}
        for name, laid in layouts.items():
            scale, shift = (torch.randn(1, shape[1], 1, 1, device=device) for _ in range(2))

            def moments(backend: str, laid: Tensor = laid) -> Tensor:
                found = group_norm_stats(laid, GROUPS, backend=backend)
                return torch.stack([found.mean, found.var])

            def exact_moments(laid: Tensor = laid) -> Tensor:
                flat = laid.cpu().double().reshape(laid.shape[0], GROUPS, -1)
                return torch.stack([flat.mean(-1), flat.var(-1, correction=0)])

            def apply(backend: str, laid: Tensor = laid, scale: Tensor = scale, shift: Tensor = shift) -> Tensor:
                return group_norm_apply(laid, scale, shift, silu=True, backend=backend)

            def exact_apply(laid: Tensor = laid, scale: Tensor = scale, shift: Tensor = shift) -> Tensor:
                return F.silu(laid.cpu().double() * scale.cpu().double() + shift.cpu().double())

            yield Job(operation=f"stats{name}", shape=shape, moved=x.nbytes, run=moments, check=moments, exact=exact_moments)
            yield Job(operation=f"apply{name}", shape=shape, moved=2 * x.nbytes, run=apply, check=apply, exact=exact_apply)


def main(arguments: list[str]) -> int:
    return bench("group_norm", __doc__ or "", jobs, [backend.name for backend in STATS], arguments)
