"""The banded autoencoder against the module itself: the values are the same, whatever is kept and however it is cut."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hires.errors import BudgetError, MemoryLadderError, RequestError
from hires.tiling.vae import TiledVAE
from hires.types import VAE_POLICIES


def small_vae(widths: tuple[int, ...] = (8, 16), resnets: int = 1, attention: bool = True, quant: bool = True) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: nn.Module = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=resnets,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=attention,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()
    for norm in (m for m in vae.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return vae


def wrap_around(vae: nn.Module, wrap: tuple[bool, bool]) -> None:
    """Make every padding of the module circular on the given axes, written independently of the bands."""

    def padded(conv: nn.Conv2d) -> Any:
        def forward(x: Tensor) -> Tensor:
            top = left = bottom = right = conv.kernel_size[0] // 2
            if conv.stride[0] == 2:  # downsampling pads once, at the end; the zeros it has there already are cut off
                x, top, left, bottom, right = x[..., :-1, :-1], 0, 0, 1, 1
            x = F.pad(x, (0, 0, top, bottom), mode="circular") if wrap[0] else F.pad(x, (0, 0, top, bottom))
            x = F.pad(x, (left, right, 0, 0), mode="circular") if wrap[1] else F.pad(x, (left, right, 0, 0))
            return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride)

        return forward

    for conv in [m for m in vae.modules() if isinstance(m, nn.Conv2d)]:
        conv.forward = padded(conv)  # type: ignore[method-assign]


def close(found: Tensor, wanted: Tensor) -> None:
    if wanted.dtype == torch.float64:
        assert (found - wanted).abs().max() <= 1e-10
        return
    error = (found - wanted) / wanted.std()
    assert error.square().mean().sqrt() <= 1e-5
    assert error.abs().max() <= 1e-4


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "widths": st.sampled_from([(8,), (8, 16), (16, 8, 8), (8, 8, 16, 4)]),
        "resnets": st.integers(1, 2),
        "attention": st.booleans(),
        "quant": st.booleans(),
    }
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    CONFIGURATIONS,
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 24),
    st.sampled_from(VAE_POLICIES),
    st.integers(1, 2),
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bands_equal_the_module(
    config: dict[str, Any],
    h: int,
    w: int,
    rows: int,
    policy: str,
    batch: int,
    wrap: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    assume(h * w > 1)  # torch's own norm refuses one value per channel
    vae = small_vae(**config).to(dtype)
    tiled = TiledVAE(vae, policy=policy, band_px=rows, wrap=wrap)
    z = torch.randn(batch, 4, h, w, dtype=dtype)
    x = torch.randn(batch, 3, h * tiled.cell_px, w * tiled.cell_px, dtype=dtype)
    with torch.inference_mode():
        found = tiled.decode(z), tiled.encode(x)
        if any(wrap):
            wrap_around(vae, wrap)
        wanted = vae.decode(z).sample, vae.encode(x).latent_dist.mean  # type: ignore[operator]
    close(found[0], wanted[0])
    if wanted[1].numel() > 4:
        close(found[1], wanted[1])


def test_whole_is_the_module_bit_for_bit() -> None:
    vae, z, x = small_vae(), torch.randn(1, 4, 7, 5), torch.randn(1, 3, 14, 10)
    tiled = TiledVAE(vae, policy="whole")
    with torch.inference_mode():
        assert torch.equal(tiled.decode(z), vae.decode(z).sample)  # type: ignore[operator]
        assert torch.equal(tiled.encode(x), vae.encode(x).latent_dist.mean)  # type: ignore[operator]


def test_rows_leave_before_the_last_ones_are_made() -> None:
    vae, calls = small_vae(), []
    vae.decoder.conv_out.register_forward_hook(lambda *_: None)
    tiled = TiledVAE(vae, policy="bands", band_px=4)
    bands = tiled.decode_bands(torch.randn(1, 4, 16, 8), lambda done, total: calls.append((done, total)))
    first = next(bands)
    assert first.shape == (1, 3, 4, 16)
    made = len(calls)
    list(bands)
    assert made < len(calls)
    assert calls[-1][0] == calls[-1][1], "the last band is the last of the total"


def out_of_memory_once(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> list[int]:
    """The `at`-th convolution from now on fails with `error`, once; the list counts convolutions."""
    real, seen = F.conv2d, []

    def conv2d(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        if len(seen) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "conv2d", conv2d)
    return seen


@pytest.mark.parametrize("at", [1, 7, 30, 59])
def test_out_of_memory_goes_down_the_ladder_and_the_picture_stays(
    at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae, z = small_vae(), torch.randn(1, 4, 12, 9)
    with torch.inference_mode():
        wanted = vae.decode(z).sample  # type: ignore[operator]
        alone = TiledVAE(vae, policy="recompute_up", band_px=5).decode(z)
        tiled = TiledVAE(vae, policy="bands", band_px=5)
        out_of_memory_once(monkeypatch, RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), at)
        with caplog.at_level(logging.WARNING):
            found = tiled.decode(z)
    close(found, wanted)
    assert tiled.last is not None
    assert (tiled.last.policy, tiled.last.taken) == ("recompute_up", 1)
    assert torch.equal(found, alone) or at > 40  # rows that had left by then are those of the first policy
    assert "out of memory with policy bands, bands of 5 rows, predicted peak" in caplog.text
    assert "going on with policy recompute_up" in caplog.text


def test_any_other_error_comes_out_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("device-side assert")
    out_of_memory_once(monkeypatch, error, 5)
    with pytest.raises(RuntimeError) as caught, torch.inference_mode():
        TiledVAE(small_vae(), policy="bands").decode(torch.randn(1, 4, 8, 8))
    assert caught.value is error


def test_the_last_rung_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv2d(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(F, "conv2d", conv2d)
    with pytest.raises(MemoryLadderError, match="give a smaller picture"), torch.inference_mode():
        TiledVAE(small_vae(), policy="bands").decode(torch.randn(1, 4, 8, 8))


def test_a_budget_chooses_the_policy() -> None:
    tiled = TiledVAE(small_vae(attention=False))
    peaks = {p.policy: p.peak_bytes for p in reversed(tiled.plan(512, 512))}
    assert peaks["whole"] > peaks["bands"] > peaks["recompute_up"] > peaks["recompute_conv"]
    assert "host" not in peaks  # a CPU has no other place to go
    for name, peak in peaks.items():
        assert TiledVAE(tiled.vae, budget_bytes=peak).plan(512, 512)[0].policy == name
    with pytest.raises(BudgetError, match="would do"):
        TiledVAE(tiled.vae, budget_bytes=1000).plan(512, 512)


def test_bad_arguments() -> None:
    with pytest.raises(RequestError, match=r"unknown VAE policy 'bandz'.*bands"):
        TiledVAE(small_vae(), policy="bandz")
    with pytest.raises(RequestError, match="band_px=0"):
        TiledVAE(small_vae(), band_px=0)


def test_half_precision_overflow_is_computed_again() -> None:
    vae = small_vae(attention=False)
    with torch.no_grad():
        vae.decoder.mid_block.resnets[0].conv1.weight.mul_(3e5)
    z = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        wanted = vae.decode(z).sample  # type: ignore[operator]
        vae.half()
        assert not vae.decode(z.half()).sample.isfinite().all()  # type: ignore[operator]
        found = TiledVAE(vae, policy="bands", band_px=3).decode(z.half())
    assert found.isfinite().all()
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.std()
