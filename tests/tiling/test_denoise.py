"""Laws 2 and 3 for the tiled denoiser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hires.errors import Cancelled, MemoryLadderError
from hires.sampling.conditioning import Conditioning, sdxl_size_ids
from hires.tiling.denoise import seeded_shift, tiled
from hires.tiling.geometry import Size, make_grid
from hires.tiling.retry import Batcher


def pointwise(x: Tensor, sigma: float, cond: object) -> Tensor:
    return torch.tanh(x) / (1 + sigma)


KERNEL = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.2


def local(x: Tensor, sigma: float, cond: object) -> Tensor:
    """Receptive radius 2."""
    return F.conv2d(torch.tanh(F.conv2d(x, KERNEL, padding=1)), KERNEL, padding=1)


def canvas(h: int, w: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, h, w, generator=torch.Generator().manual_seed(h * 1000 + w))


def test_law_2_one_tile_is_no_tiling_bit_for_bit() -> None:
    x = canvas(37, 53)
    assert torch.equal(tiled(local, make_grid(Size(37, 53), Size(64, 64), 0))(x, 1.0, None), local(x, 1.0, None))


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 70), st.integers(5, 70), st.integers(4, 32), st.floats(0, 0.8), st.integers(1, 7))
def test_law_2_a_pointwise_denoiser_is_the_same_tiled_and_whole(h: int, w: int, tile: int, share: float, batch: int) -> None:
    x = canvas(h, w)
    grid = make_grid(Size(h, w), Size(tile, tile), int(share * min(tile, h, w)))
    torch.testing.assert_close(tiled(pointwise, grid, batch=batch)(x, 0.7, None), pointwise(x, 0.7, None), rtol=0, atol=2e-6)


def test_law_2_tile_cores_equal_the_whole_for_a_local_denoiser() -> None:
    x = canvas(50, 71)
    grid = make_grid(Size(50, 71), Size(24, 24), 8)
    whole, fused = local(x, 1.0, None), tiled(local, grid, batch=3)(x, 1.0, None)
    cores = 0
    for box in grid.boxes():  # cells that only this tile covers lie at least the overlap away from its inner edges
        alone = torch.zeros(50, 71, dtype=torch.bool)
        alone[box.rows, box.cols] = True
        for other in grid.boxes():
            if other != box:
                alone[other.rows, other.cols] = False
        cores += int(alone.sum())
        torch.testing.assert_close(fused[..., alone], whole[..., alone], rtol=0, atol=1e-6)
    assert cores > 300
    assert (fused - whole).abs().max() > 1e-4  # near tile edges a zero-padded convolution must differ: the check can fail


def test_law_3_the_result_does_not_depend_on_tile_batch() -> None:
    x = canvas(61, 47)
    grid = make_grid(Size(61, 47), Size(16, 16), 4)
    results = [tiled(local, grid, batch=batch)(x, 1.0, None) for batch in (1, 2, 5, 64)]
    for other in results[1:]:
        assert (other - results[0]).abs().max() <= 1e-5 * results[0].abs().max()


def test_law_3_the_result_does_not_depend_on_out_of_memory_retries() -> None:
    x, calls = canvas(61, 47), []
    grid = make_grid(Size(61, 47), Size(16, 16), 4)

    def scarce(tiles: Tensor, sigma: float, cond: object) -> Tensor:
        calls.append(len(tiles))
        if len(tiles) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return torch.cat([local(t[None], sigma, cond) for t in tiles])

    batcher = Batcher(8)
    fused = tiled(scarce, grid, batch=batcher)(x, 1.0, None)
    assert torch.equal(fused, tiled(local, grid, batch=1)(x, 1.0, None))
    assert batcher.retries == 2
    assert calls[:3] == [8, 4, 2]
    assert sum(n for n in calls if n <= 2) == grid.count  # every tile once: finished work is kept


def test_a_single_tile_that_does_not_fit_names_the_next_move() -> None:
    def never(tiles: Tensor, sigma: float, cond: object) -> Tensor:
        raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")

    with pytest.raises(MemoryLadderError, match="tile_px"):
        tiled(never, make_grid(Size(32, 32), Size(16, 16), 0), batch=4)(canvas(32, 32), 1.0, None)


def test_a_tile_knows_where_in_the_picture_it_is() -> None:
    seen: list[list[float]] = []

    def watching(tiles: Tensor, sigma: float, cond: Conditioning) -> Tensor:
        assert cond.size_ids is not None
        assert cond.image_latents is not None
        assert cond.image_latents.shape[-2:] == tiles.shape[-2:]
        seen.extend(cond.size_ids.tolist())
        return tiles

    ids = sdxl_size_ids(Size(512, 384), 2)
    cond = Conditioning(tokens=torch.zeros(2, 3, 5), size_ids=ids, image_latents=canvas(64, 48, 2))
    grid = make_grid(Size(64, 48), Size(32, 32), 0)
    tiled(watching, grid, batch=3)(canvas(64, 48, 2), 1.0, cond)
    assert seen == [[512, 384, 8 * b.top, 8 * b.left, 512, 384] for b in grid.boxes() for _ in range(2)]
    assert ids[0].tolist() == [512, 384, 0, 0, 512, 384]  # the canvas's own are untouched


def test_a_seeded_shift_moves_the_grid_and_changes_nothing_pointwise() -> None:
    x = canvas(80, 80)
    grid = make_grid(Size(80, 80), Size(24, 24), 12)
    shift = seeded_shift(5, 1, 6)
    assert shift(0.5) == shift(0.5)
    assert len({shift(s) for s in (0.1, 0.2, 0.3, 0.4, 0.5)}) > 1
    torch.testing.assert_close(tiled(pointwise, grid, shift=shift)(x, 0.5, None), pointwise(x, 0.5, None), rtol=0, atol=2e-6)


def test_progress_is_told_and_may_cancel() -> None:
    told: list[int] = []

    def stop(tiles: int) -> None:
        told.append(tiles)
        if len(told) == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        tiled(pointwise, make_grid(Size(64, 64), Size(16, 16), 0), batch=3, on_tiles=stop)(canvas(64, 64), 1.0, None)
    assert told == [3, 3]
