"""AutoencoderTiny in bands with a halo: the same as the whole."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.allocations import counted
from hires.errors import BudgetError, MemoryLadderError, RequestError
from hires.tiling.halo import HaloVAE, reach

DATA = Path(os.environ.get("HIRES_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def tiny(dtype: torch.dtype = torch.float64, blocks: tuple[int, ...] = (1, 1)) -> nn.Module:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths = (6,) * len(blocks)
    vae: nn.Module = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
    )
    return (vae if dtype == torch.float32 else vae.to(dtype)).eval()  # fake tensors cannot be cast


def circular(vae: nn.Module, wrap: tuple[bool, bool]) -> None:
    """Every convolution of the module pads by wrapping around on the given axes."""
    for conv in [m for m in vae.modules() if isinstance(m, nn.Conv2d)]:

        def forward(x: Tensor, conv: nn.Conv2d = conv) -> Tensor:
            x = F.pad(x, (0, 0, 1, 1), mode="circular") if wrap[0] else F.pad(x, (0, 0, 1, 1))
            x = F.pad(x, (1, 1, 0, 0), mode="circular") if wrap[1] else F.pad(x, (1, 1, 0, 0))
            return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride)

        if conv.kernel_size == (3, 3):
            conv.forward = forward  # type: ignore[method-assign]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(2, 6), st.integers(1, 60), st.booleans(), st.booleans(), st.integers(1, 2))
def test_bands_equal_the_whole(h: int, w: int, band: int, rows: bool, cols: bool, batch: int) -> None:
    vae = tiny()
    tiled = HaloVAE(vae, band_px=band, wrap=(rows, cols))
    z = torch.randn(batch, 4, h, w, dtype=torch.float64)
    x = torch.randn(batch, 3, 2 * h, 2 * w, dtype=torch.float64)
    with torch.inference_mode():
        found = tiled.decode(z), tiled.encode(x)
        circular(vae, (rows, cols))
        wanted = vae.decode(z).sample, vae.encode(x).latents  # type: ignore[operator]
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-12


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_the_reach_is_tight(half: str) -> None:
    vae = tiny(blocks=(1, 3, 3, 3))
    layers: nn.Module = getattr(vae, half).layers
    rows = reach(layers)
    up = 8 if half == "decoder" else 1
    for part in layers.modules():  # an activation may hide a dependence; without one nothing does
        if isinstance(part, nn.ReLU):
            part.forward = lambda x: x  # type: ignore[method-assign]
    channels = 4 if half == "decoder" else 3
    z = torch.randn(1, channels, 8 * (2 * rows // 8 + 6), 8, dtype=torch.float64, requires_grad=True)
    middle = z.shape[2] // 16 * 8
    out = layers(z)
    at = middle * up if half == "decoder" else middle // 8
    out[:, :, at].sum().backward()
    assert z.grad is not None
    seen = torch.nonzero(z.grad.abs().sum(dim=(0, 1, 3)))
    assert middle - int(seen.min()) == rows
    assert int(seen.max()) - middle <= rows


def test_taesd_reaches_19_cells() -> None:
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny()
    assert HaloVAE(vae).decode_reach == 19
    assert 8 * HaloVAE(vae).encode_reach >= reach(vae.encoder.layers) > 8 * (HaloVAE(vae).encode_reach - 1)


def test_out_of_memory_halves_the_bands(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    vae, z = tiny(torch.float32), torch.randn(1, 4, 40, 6)
    real = vae.decode

    def scarce(part: Tensor, **kwargs: object) -> object:
        if part.shape[2] > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(part, **kwargs)  # type: ignore[operator]

    monkeypatch.setattr(vae, "decode", scarce)
    tiled = HaloVAE(vae)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        found = tiled.decode(z)
        assert (found - real(z).sample).abs().max() < 1e-5  # type: ignore[operator]
    assert tiled.last is not None
    assert tiled.last.taken > 0
    assert "going on with policy halo" in caplog.text
    monkeypatch.setattr(vae, "decode", lambda part, **kwargs: scarce(torch.empty(1, 4, 99, 1)))
    with pytest.raises(MemoryLadderError, match="every rung"):
        tiled.decode(z)


def test_a_budget_chooses_the_bands_and_covers_what_is_allocated() -> None:
    from diffusers import AutoencoderTiny

    for encode in (False, True):
        with counted() as found:
            vae = AutoencoderTiny()
            tiled = HaloVAE(vae, band_px=256)
            tiled.device = torch.device("cuda")  # fake tensors hold what a card would; the plan then adds no CPU scratch
            planned = tiled.plan(128, 64, encode=encode)[0]
            tiled.device = torch.device("cpu")
            x, z = torch.empty(1, 3, 1024, 512), torch.empty(1, 4, 128, 64)
            found.live = found.peak = 0
            if encode:
                tiled.encode(x)
            else:
                for rows in tiled.decode_bands(z):
                    del rows
        assert found.peak <= planned.peak_bytes <= 1.05 * found.peak
    tiled = HaloVAE(tiny(torch.float32))
    ways = tiled.plan(200, 50)
    assert [way.band_rows for way in ways] == [400, 256, 128, 64, 32, 16, 8]
    assert ways[0].flops < ways[3].flops, "halo rows are counted"
    budget = ways[3].peak_bytes
    assert HaloVAE(tiled.vae, budget_bytes=budget).plan(200, 50)[0] == ways[3]
    with pytest.raises(BudgetError, match="would do"):
        HaloVAE(tiled.vae, budget_bytes=100).plan(200, 50)


def test_a_module_with_norms_is_refused() -> None:
    with pytest.raises(RequestError, match="use TiledVAE"):
        reach(nn.Sequential(nn.Conv2d(3, 3, 3), nn.GroupNorm(1, 3)))
    with pytest.raises(RequestError, match="band_px=0"):
        HaloVAE(tiny(), band_px=0)


def real_vae_and_photo() -> tuple[nn.Module, Tensor]:
    folder, photo = DATA / "taesdxl", DATA / "photos" / "seeding_CC0_5312x2988.jpg"
    if not folder.is_dir() or not photo.is_file():
        pytest.skip(f"{DATA} holds no taesdxl and photographs; HIRES_TEST_DATA names another folder")
    from PIL import Image

    from hires.models.loading import load_autoencoder

    with Image.open(photo) as opened:
        pixels = np.array(opened.convert("RGB"))[:2984]
    vae = load_autoencoder(folder, torch.float32, torch.device("cpu"))
    return vae, torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.slow
def test_the_real_taesdxl_on_part_of_a_photograph() -> None:
    vae, picture = real_vae_and_photo()
    picture = picture[..., 800:1600, 2400:2912]
    tiled = HaloVAE(vae, band_px=200)
    with torch.inference_mode():
        z = tiled.encode(picture)
        found = tiled.decode(z)
        assert (z - vae.encode(picture).latents).abs().max() <= 1e-5  # type: ignore[operator]
        assert (found - vae.decode(z).sample).abs().max() <= 1e-5  # type: ignore[operator]
    assert 10 * torch.log10(4 / (found - picture).square().mean()) > 24


@pytest.mark.slow
def test_the_real_taesdxl_on_a_whole_5k_photograph() -> None:
    vae, picture = real_vae_and_photo()
    tiled = HaloVAE(vae, band_px=512)
    with torch.inference_mode():
        z = tiled.encode(picture)
        assert (z - vae.encode(picture).latents).abs().max() <= 1e-5  # type: ignore[operator]
        found = tiled.decode(z)
        assert (found - vae.decode(z).sample).abs().max() <= 1e-5  # type: ignore[operator]
    assert found.shape == picture.shape
