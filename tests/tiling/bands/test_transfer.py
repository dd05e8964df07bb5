"""Bands in host memory: what is parked is read through the copier only, and what comes next is fetched ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from hires.tiling.bands.memory import pinned_bytes
from hires.tiling.bands.rows import BandSetting, Given, Kept
from hires.tiling.bands.transfer import Arriving, Copier
from hires.tiling.vae import TiledVAE
from tests.tiling.test_vae import small_vae


class LateCopier(Copier):
    """A card's stream at its slowest: nothing is copied before a fetch is taken, and then in order."""

    queue: list[Callable[[], None]]
    fetched = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queue = []

    def park(self, band: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        kept = torch.full_like(band, float("nan"), memory_format=layout)
        self.queue.append(lambda: kept.copy_(band))
        return kept

    def fetch(self, parts: Sequence[Tensor], dtype: torch.dtype, dim: int = 2) -> Arriving:
        type(self).fetched += 1
        rows = torch.full_like(torch.cat(list(parts), dim=dim), float("nan"), dtype=dtype)
        self.queue.append(lambda: rows.copy_(torch.cat(list(parts), dim=dim)))
        return LateArrival(self, rows)


class LateArrival(Arriving):
    def __init__(self, copier: LateCopier, rows: Tensor) -> None:
        super().__init__(rows)
        self.copier = copier

    def take(self) -> Tensor:
        while self.copier.queue:
            self.copier.queue.pop(0)()
        return self.rows


@pytest.mark.parametrize("wrap", [(False, False), (True, True)])
def test_nothing_reads_parked_memory_before_its_copy(monkeypatch: pytest.MonkeyPatch, wrap: tuple[bool, bool]) -> None:
    vae = small_vae().double()
    z = torch.randn(1, 4, 13, 6, dtype=torch.float64)
    expected = TiledVAE(vae, policy="bands", band_px=4, wrap=wrap)
    pixels, latents = expected.decode(z), expected.encode(expected.decode(z))
    for where in ("rows", "layers"):
        monkeypatch.setattr(f"hires.tiling.bands.{where}.Copier", LateCopier)
    tiled = TiledVAE(vae, policy="host", band_px=4, wrap=wrap)
    torch.testing.assert_close(tiled.decode(z), pixels, rtol=0, atol=1e-10)
    torch.testing.assert_close(tiled.encode(pixels), latents, rtol=0, atol=1e-10)
    assert LateCopier.fetched


def kept(height: int, band_rows: int) -> tuple[Tensor, Kept]:
    rows = torch.randn(1, 3, height, 5)
    source = Given(3, height, 5, lambda top, bottom: rows[:, :, top:bottom])
    return rows, Kept(source, BandSetting(band_rows=band_rows, host=True))


def test_rows_read_in_any_order_are_the_right_ones() -> None:
    rows, map_ = kept(40, 7)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        top, count = (int(torch.randint(0, high, (), generator=generator)) for high in (40, 12))
        bottom = min(40, top + 1 + count)
        assert torch.equal(map_.read(top, bottom), rows[:, :, top:bottom])


def test_a_steady_reader_finds_its_next_rows_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, map_ = kept(64, 8)
    asked: list[int] = []
    real = Copier.fetch

    def counting(self: Copier, parts: Sequence[Tensor], dtype: torch.dtype, dim: int = 2) -> Arriving:
        asked.append(sum(part.shape[2] for part in parts))
        return real(self, parts, dtype, dim)

    monkeypatch.setattr(Copier, "fetch", counting)
    for top in range(0, 64, 8):
        before = len(asked)
        first, last = max(0, top - 1), min(64, top + 9)
        assert torch.equal(map_.read(first, last), rows[:, :, first:last])
        map_.release(top + 7)
        if top >= 32:  # read ahead of this call: it asks for the rows after these only, and for none at the end
            assert len(asked) - before == (1 if last < 64 else 0)
    assert max(asked) == 10


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (4096, 4096), (4097, 8192), (3 * 2**20, 4 * 2**20)])
def test_pinned_blocks_are_powers_of_two(size: int, taken: int) -> None:
    assert pinned_bytes(size) == taken
