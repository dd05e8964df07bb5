"""Networks in tiles: the receptive field found by NaN, tiles equal to the whole, out-of-memory with the rest kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hires.errors import MemoryLadderError
from hires.tiling import network as module
from hires.tiling import retry
from hires.tiling.geometry import Size
from hires.tiling.network import NetworkRows, Tiling, choose_tiling
from hires.tiling.reach import choose_halo, reach
from hires.tiling.resample import WholeRows


def convolutions(*sides: int, scale: int = 2, channels: int = 3) -> Callable[[Tensor], Tensor]:
    """3 channels through convolutions of these kernel sides, then `scale` by sub-pixels."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for side in sides:
        layers += [nn.Conv2d(channels, channels, side, padding=side // 2), nn.PReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(channels, channels * scale**2, 1), nn.PixelShuffle(scale)).eval()

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return net(x)  # type: ignore[no-any-return]

    return run


def windows(x: Tensor, side: int = 4, shift: int = 0) -> Tensor:
    """Each pixel plus the mean of its window; the windows begin at multiples of the side, `shift` apart."""
    rolled = torch.roll(x, (shift, shift), (-2, -1))
    mean = F.interpolate(F.avg_pool2d(rolled, side), scale_factor=side)
    return torch.roll(rolled + mean, (-shift, -shift), (-2, -1))


@pytest.mark.parametrize(("sides", "radius"), [((3,), 1), ((3, 3, 3), 3), ((5, 1, 7), 5), ((1,), 0), ((9,) * 12, 48)])
def test_the_reach_of_convolutions_is_the_sum_of_their_radii(sides: tuple[int, ...], radius: int) -> None:
    assert reach(convolutions(*sides), 3, 2) == radius


def test_a_dilated_convolution_and_a_dead_one() -> None:
    """The weights do not matter, zeros included: what is read is read."""
    conv = nn.Conv2d(3, 3, 3, padding=5, dilation=5)
    nn.init.zeros_(conv.weight)
    assert reach(conv, 3, 1) == 5


def test_windows_reach_to_their_far_edge_and_shifted_ones_further() -> None:
    assert reach(windows, 3, 1, multiple=4) == 3
    # from the last pixel of a window over the shifted one, two pixels on, to the end of that: at most 3 + 2
    assert reach(lambda x: windows(windows(x), shift=2), 3, 1, multiple=4) == 5


def test_what_looks_at_everything_has_no_reach_and_a_measured_halo() -> None:
    def network(x: Tensor) -> Tensor:
        return x * (1 + 0.1 * x.mean((-2, -1), keepdim=True))

    assert reach(network, 3, 1) is None
    halo = choose_halo(network, 3, 1)
    assert not halo.exact
    assert 0 < halo.error < 0.1
    assert "approximation: the network sees the whole picture" in str(halo)


def test_a_long_reach_that_fades_takes_a_shorter_halo_and_says_so() -> None:
    """130 blurs reach 130 pixels; what lies beyond a few of their deviations (8 px) is below half a level."""
    kernel = torch.tensor([0.25, 0.5, 0.25]).outer(torch.tensor([0.25, 0.5, 0.25]))[None, None]

    def blurred(x: Tensor) -> Tensor:
        for _ in range(130):
            x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel)
        return x

    halo = choose_halo(blurred, 1, 1)
    assert halo.reach == 130
    assert 16 <= halo.pixels < 64
    assert halo.error <= 1 / 512


def tiled(network: Callable[[Tensor], Tensor], picture: Tensor, tiling: Tiling, scale: int = 2, bands: int = 13) -> Tensor:
    source = NetworkRows(WholeRows(picture), network, scale, tiling)
    return torch.cat([source.rows(top, min(top + bands, source.size.height)) for top in range(0, source.size.height, bands)], 1)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_law_2_tiles_are_the_whole(height: int, width: int, rows: int, cols: int) -> None:
    """Zero padding at the picture's edges included, at any tile, the picture no multiple of it."""
    network = convolutions(5, 3, 3)
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(height))
    whole = network(picture[None])[0]
    assert torch.allclose(tiled(network, picture, Tiling(rows=rows, cols=cols, halo=4)), whole, atol=1e-6)


def test_one_row_less_of_halo_is_seen() -> None:
    network, picture = convolutions(5, 3, 3), torch.rand(3, 50, 40)
    whole = network(picture[None])[0]
    assert not torch.allclose(tiled(network, picture, Tiling(rows=16, cols=16, halo=3)), whole, atol=1e-4)


def test_windows_lie_where_they_lie_in_the_whole() -> None:
    picture = torch.rand(3, 40, 48)
    found = tiled(lambda x: windows(windows(x), shift=2), picture, Tiling(rows=12, cols=16, halo=8, multiple=4), scale=1)
    whole = windows(windows(picture[None]), shift=2)[0]
    inner = (slice(None), slice(4, -4), slice(4, -4))  # a window that is rolled over the edge is another with other tiles
    assert torch.allclose(found[inner], whole[inner], atol=1e-6)


def test_out_of_memory_halves_the_tile_and_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 700 pixels at once have no room: no part of the result is computed twice, and it is that of the whole."""
    network, picture = convolutions(3, 3), torch.rand(3, 61, 53)
    calls: list[Size] = []
    failed: list[Size] = []

    def scarce(x: Tensor) -> Tensor:
        size = Size(*x.shape[-2:])
        if size.area > 700:
            failed.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        calls.append(size)
        return network(x)

    source = NetworkRows(WholeRows(picture), scarce, 2, Tiling(rows=40, cols=40, halo=2))
    found = source.rows(0, 122)
    assert torch.allclose(found, network(picture[None])[0], atol=1e-6)
    assert source.retries == len(failed) <= 3, "the size that had room is remembered"
    assert sum((size.height - 4) * (size.width - 4) for size in calls) <= 61 * 53


def test_no_room_for_the_smallest_tile_ends_with_numbers() -> None:
    def never(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with pytest.raises(MemoryLadderError, match=r"tile of \d+x\d+ px with a halo of 2 runs out of memory"):
        NetworkRows(WholeRows(torch.rand(3, 64, 64)), never, 2, Tiling(rows=64, cols=64, halo=2)).rows(0, 1)


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.attempt is retry.attempt

    def wrong(x: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        NetworkRows(WholeRows(torch.rand(3, 9, 9)), wrong, 2, Tiling(rows=9, cols=9, halo=0)).rows(0, 1)


def test_progress_counts_every_tile_once() -> None:
    told: list[tuple[int, int]] = []
    tiling = Tiling(rows=16, cols=24, halo=1)
    source = NetworkRows(WholeRows(torch.rand(3, 50, 70)), convolutions(3), 2, tiling, lambda *at: told.append(at))
    source.rows(0, 1)
    source.rows(50, 100)
    assert told == [(done, 12) for done in range(1, 13)]


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([1, 8, 16]), st.integers(0, 40), st.integers(1, 2**34))
def test_a_tiling_keeps_to_its_budget(height: int, width: int, multiple: int, halo: int, budget: int) -> None:
    halo = -(-halo // multiple) * multiple
    size = Size(height, width)
    tiling = choose_tiling(
        size, halo=halo, multiple=multiple, bytes_per_px=500.0, budget_bytes=budget, band_bytes=2**26, row_bytes=48 * width
    )
    least = -(-16 // multiple) * multiple
    pixels = (tiling.rows + 2 * halo) * (tiling.cols + 2 * halo)
    assert pixels * 500 <= budget or tiling.cols <= least or tiling.rows <= least
    assert tiling.rows * 48 * width <= 2**26 or tiling.rows <= least
    assert tiling.rows < height + multiple + 16
