"""`python -m benchmarks blend`: a tile fused on the canvas of latents, and finished rows to 8 and 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.suites.maps import Job, bench
from hires.kernels.blend import ACCUMULATE, LEVELS, blend_accumulate, to_integers

BAND_ROWS = 64


def jobs(side: int, dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    cells = side // 8
    tile_cells = min(128, cells)
    tile = torch.randn(1, 4, tile_cells, tile_cells, device=device, dtype=dtype)
    rows, cols = (torch.rand(tile_cells, device=device) for _ in range(2))
    canvas = torch.zeros(1, 4, cells, cells, device=device)

    def blend(backend: str) -> Tensor:
        blend_accumulate(canvas, tile, rows, cols, cells - tile_cells, 0, backend=backend)
        return canvas

    def blend_once(backend: str) -> Tensor:
        canvas.zero_()
        return blend(backend)

    def exact_blend() -> Tensor:
        exact = torch.zeros(1, 4, cells, cells, dtype=torch.float64)
        weights = rows.cpu().double()[:, None] * cols.cpu().double()[None, :]
        exact[..., cells - tile_cells :, :tile_cells] = weights * tile.cpu().double()
        return exact

    moved = tile.nbytes + 8 * tile.numel()
    yield Job(operation="blend", shape=tuple(tile.shape), moved=moved, run=blend, check=blend_once, exact=exact_blend)
    band = torch.rand(3, min(BAND_ROWS, side), side, device=device).mul_(2.2).sub_(1.1).to(dtype)
    for bits in LEVELS:

        def convert(backend: str, bits: int = bits) -> Tensor:
            return to_integers(band, bits, backend=backend)

        def exact_convert(bits: int = bits) -> Tensor:
            scaled = (band.cpu().double() + 1) * (LEVELS[bits] / 2)
            return (scaled.clamp(0, LEVELS[bits]) + 0.5).floor().permute(1, 2, 0)

        moved = band.nbytes + band.numel() * bits // 8
        yield Job(
            operation=f"to {bits} bits", shape=tuple(band.shape), moved=moved, run=convert, check=convert, exact=exact_convert
        )


def main(arguments: list[str]) -> int:
    return bench("blend", __doc__ or "", jobs, [backend.name for backend in ACCUMULATE], arguments)
