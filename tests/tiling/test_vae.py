"""The banded autoencoder against the module itself: the values are the same, whatever is kept and however it is cut."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hires.errors import BudgetError, MemoryLadderError, RequestError
from hires.kernels.attention_policies import NPA, Global, KVPool, Policy, Rows, Windows
from hires.kernels.backends import BackendRefused
from hires.kernels.dispatch import BACKENDS, AttentionSpec
from hires.kernels.torch_windows import attention_masked
from hires.tiling.bands.layers import Attended, Progress, band_setting, decode_layers
from hires.tiling.bands.rows import Given
from hires.tiling.bands.storage import VAE_POLICIES
from hires.tiling.vae import TiledVAE
from tests.support.speed import examples


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


def close(found: Tensor, wanted: Tensor, exact: Tensor) -> None:
    """Within the law's bound or, where norms of a few values make the module itself worse than that, twice its own error.

    `exact` is the module's result in float64.
    """
    if wanted.dtype == torch.float64:
        assert (found - wanted).abs().max() <= 1e-10
        return
    error, own = (found - wanted) / exact.std(), (wanted - exact) / exact.std()
    assert error.square().mean().sqrt() <= max(1e-5, 2 * own.square().mean().sqrt())
    assert error.abs().max() <= max(1e-4, 2 * own.abs().max())


CONFIGURATIONS = st.fixed_dictionaries(
    {
        "widths": st.sampled_from([(8,), (8, 16), (16, 8, 8), (8, 8, 16, 4)]),
        "resnets": st.integers(1, 2),
        "attention": st.booleans(),
        "quant": st.booleans(),
    }
)


@settings(max_examples=examples(60, 200), deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
        vae, z, x = vae.double(), z.double(), x.double()
        exact = vae.decode(z).sample, vae.encode(x).latent_dist.mean  # type: ignore[operator]
    close(found[0], wanted[0], exact[0])
    if wanted[1].numel() > 4:
        close(found[1], wanted[1], exact[1])


@pytest.mark.slow
def test_the_full_sdxl_architecture_at_1024() -> None:
    from benchmarks.suites.vae import sdxl_vae

    vae = sdxl_vae(torch.device("cpu"))
    z, x = torch.randn(1, 4, 128, 128), torch.rand(1, 3, 1024, 1024) * 2 - 1
    with torch.inference_mode():
        wanted = vae.decode(z).sample, vae.encode(x).latent_dist.mean  # type: ignore[operator]
        for policy in VAE_POLICIES:
            tiled = TiledVAE(vae, policy=policy)
            assert (tiled.decode(z) - wanted[0]).abs().max() <= 1e-4, policy
            assert (tiled.encode(x) - wanted[1]).abs().max() <= 1e-4, policy


def test_whole_is_the_module_bit_for_bit() -> None:
    vae, z, x = small_vae(), torch.randn(1, 4, 7, 5), torch.randn(1, 3, 14, 10)
    tiled = TiledVAE(vae, policy="whole")
    with torch.inference_mode():
        assert torch.equal(tiled.decode(z), vae.decode(z).sample)  # type: ignore[operator]
        assert torch.equal(tiled.encode(x), vae.encode(x).latent_dist.mean)  # type: ignore[operator]


def test_rows_leave_before_the_last_ones_are_made() -> None:
    vae, calls = small_vae(), []
    tiled = TiledVAE(vae, policy="bands", band_px=4)
    bands = tiled.decode_bands(torch.randn(1, 4, 16, 8), lambda done, total: calls.append((done, total)))
    first = next(bands)
    assert first.shape == (1, 3, 4, 16)
    made = len(calls)
    list(bands)
    assert made < len(calls)
    assert calls[-1][0] == calls[-1][1], "the last band is the last of the total"


class Fault(TorchDispatchMode):
    """The `at`-th operator call fails with `error`, once; `calls` counts them all."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        super().__init__()
        self.error, self.at, self.calls = error, at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls == self.at and self.error is not None:
            raise self.error
        return func(*args, **(kwargs or {}))


DISGUISES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
)


def decoded(tiled: TiledVAE, z: Tensor, error: BaseException | None = None, at: int = 0) -> tuple[list[Tensor], int]:
    with torch.inference_mode(), Fault(error, at) as fault:
        return list(tiled.decode_bands(z)), fault.calls


def take_turns(at: int) -> tuple[BaseException, ...]:
    return (DISGUISES[at % len(DISGUISES)],)


def each_time(at: int) -> tuple[BaseException, ...]:
    return DISGUISES


@pytest.mark.parametrize(
    ("errors_at", "every"),
    [(take_turns, 5), *(pytest.param(how, 1, marks=pytest.mark.slow) for how in (take_turns, each_time))],
)
@pytest.mark.parametrize(("first", "then"), [("whole", "bands"), ("bands", "recompute_up")])
def test_out_of_memory_at_every_operator_call(
    first: str, then: str, errors_at: Callable[[int], tuple[BaseException, ...]], every: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A disguise at each call, or at every fifth and the last: the ladder goes down and says so; pixels are the last one's."""
    vae, z = small_vae((8, 16)), torch.randn(1, 4, 8, 5)
    tiled = TiledVAE(vae, policy=first, band_px=16)  # 16 rows are one band of the last map: nothing has left by then
    alone = decoded(TiledVAE(vae, policy=then, band_px=16), z)[0]
    _, calls = decoded(tiled, z)
    assert calls > 80
    in_last_map = 0
    tried = [call for call in range(1, calls + 1) if call % every == 0 or call > calls - 6]
    for at, error in [(call, error) for call in tried for error in errors_at(call)]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hires"):
            found, _ = decoded(tiled, z, error, at)
        assert tiled.last is not None
        if tiled.last.taken:
            assert (tiled.last.policy, tiled.last.taken) == (then, 1)
            assert torch.equal(torch.cat(found, dim=2), torch.cat(alone, dim=2)), at
            assert f"out of memory with policy {first}" in caplog.text
            assert f"going on with policy {then}" in caplog.text
        else:  # in the last map: the same policy goes on with smaller bands
            in_last_map += 1
            assert first != "whole"
            assert "bands of 8 rows" in caplog.text
            close(torch.cat(found, dim=2), torch.cat(alone, dim=2), torch.cat(alone, dim=2).double())
    assert 0 < in_last_map < 12 * len(errors_at(0)) or first == "whole"


@pytest.mark.parametrize(
    "error",
    [DISGUISES[0], *(pytest.param(error, marks=pytest.mark.slow) for error in DISGUISES[1:])],
    ids=lambda error: str(error)[:40],
)
@pytest.mark.parametrize("every", [35, pytest.param(7, marks=pytest.mark.slow)])
def test_out_of_memory_in_encoding(error: BaseException, every: int) -> None:
    vae, x = small_vae(), torch.randn(1, 3, 18, 12)
    tiled = TiledVAE(vae, policy="bands", band_px=5)
    with torch.inference_mode():
        wanted = vae.encode(x).latent_dist.mean  # type: ignore[operator]
        with Fault() as counter:
            tiled.encode(x)
        for at in range(1, counter.calls + 1, every):
            with Fault(error, at):
                close(tiled.encode(x), wanted, wanted.double())
            assert tiled.last is not None
            assert tiled.last.policy in ("bands", "recompute_up")


def test_finished_maps_and_rows_are_kept() -> None:
    """An OOM late in the decoder costs the layers since the last whole map; rows that left are not made again."""
    vae, z = small_vae(), torch.randn(1, 4, 16, 8)
    tiled, layers = TiledVAE(vae, policy="bands", band_px=8), []
    alone, calls = decoded(tiled, z)
    wanted, late = torch.cat(alone, dim=2), calls * 2 // 5
    with torch.inference_mode(), Fault(DISGUISES[0], late) as fault:
        rows = list(tiled.decode_bands(z, lambda done, total: layers.append(total)))
    assert tiled.last is not None
    assert tiled.last.taken == 1
    assert calls < fault.calls < 1.25 * calls, "from the start it would be 1.4 times as many"
    assert layers[-1] < layers[0]
    close(torch.cat(rows, dim=2), wanted, wanted.double())
    bands = tiled.decode_bands(z)
    first = next(bands)
    with torch.inference_mode(), Fault(DISGUISES[0], 1):
        rest = list(bands)
    assert torch.equal(first, alone[0])
    close(torch.cat([first, *rest], dim=2), wanted, wanted.double())


@pytest.mark.parametrize("policy", [VAE_POLICIES[1], pytest.param(VAE_POLICIES[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("every", [87, pytest.param(29, marks=pytest.mark.slow)])
def test_out_of_memory_between_many_bands(policy: str, every: int) -> None:
    """Maps of many bands, partly freed, with halos: every so many calls one fails, and another one 40 calls later."""
    vae, z = small_vae(), torch.randn(1, 4, 16, 5)
    tiled, steps = TiledVAE(vae, policy=policy, band_px=10), []
    wanted = torch.cat(decoded(TiledVAE(vae, policy="whole"), z)[0], dim=2)
    _, calls = decoded(tiled, z)
    for at in range(1, calls + 1, every):
        with torch.inference_mode(), Fault(DISGUISES[0], at), Fault(DISGUISES[3], at + 40):
            rows = list(tiled.decode_bands(z, lambda done, total: steps.append((done, total))))
        close(torch.cat(rows, dim=2), wanted, wanted.double())
        assert tiled.last is not None
        assert tiled.last.taken + tiled.last.halved > 0
        assert steps[-1][0] == steps[-1][1], "progress ends at its total"


def test_a_map_that_the_next_policy_must_not_hold_is_no_place_to_go_on_from() -> None:
    vae = small_vae()
    z = torch.randn(1, 4, 8, 5)
    progress = Progress()
    setting = band_setting("bands", 4, (False, False), torch.float32)
    given = Given(4, 8, 5, lambda top, bottom: z[..., top:bottom, :])
    layers = decode_layers(vae)
    doubled = next(index for index, layer in enumerate(layers) if layer.kind == "double")
    with torch.inference_mode():
        progress.run(layers[: doubled + 1], given, setting)
    assert progress.large
    assert progress.resume(band_setting("host", 4, (False, False), torch.float32), given) is progress.map
    assert progress.resume(band_setting("recompute_up", 4, (False, False), torch.float32), given) is given


@pytest.mark.parametrize("every", [62, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_any_other_error_comes_out_unchanged(error: BaseException, every: int) -> None:
    vae, z = small_vae(), torch.randn(1, 4, 8, 5)
    tiled = TiledVAE(vae, policy="bands", band_px=5)
    _, calls = decoded(tiled, z)
    for at in range(1, calls + 1, every):
        with pytest.raises(type(error)) as caught:
            decoded(tiled, z, error, at)
        assert caught.value is error


def test_the_last_rung_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def conv2d(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(F, "conv2d", conv2d)
    with pytest.raises(MemoryLadderError, match=r"every rung.*give a smaller picture"), torch.inference_mode():
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


POLICIES = (NPA(8), NPA(8, (1, 3)), Windows(4), Windows(5, (2, 0)), Rows(5), KVPool(2), KVPool(5))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("wrap", [(False, False), (True, False), (False, True)], ids=str)
def test_a_policy_of_attention_is_the_same_in_any_bands(policy: Policy, wrap: tuple[bool, bool]) -> None:
    """Against the mid block's attention written out in float64, all scores at once."""
    if any(wrap) and not isinstance(policy, NPA | Windows):
        pytest.skip("rows and pooled keys do not wrap")
    vae, z = small_vae(), torch.randn(1, 4, 13, 11, generator=torch.Generator().manual_seed(1))
    attn: Any = vae.get_submodule("decoder.mid_block.attentions.0")
    around = replace(policy, circular=wrap) if isinstance(policy, NPA | Windows) else policy
    maps = torch.randn(1, attn.to_q.in_features, 13, 11, generator=torch.Generator().manual_seed(2))
    source = Given(attn.to_q.in_features, 13, 11, lambda top, bottom: maps[:, :, top:bottom])
    with torch.inference_mode():
        tokens = attn.group_norm(maps.flatten(2)).transpose(1, 2)
        q, k, v = (
            linear(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = attention_masked(q, k, v, (13, 11), around, attn.scale).float()
        expected = attn.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, (13, 11)) + maps
        for name, rows in (("bands", 4), ("bands", 13), ("host", 5), ("recompute_conv", 3)):
            setting = band_setting(name, rows, wrap, torch.float32)
            setting.attention = around
            found = torch.cat([Attended(source, attn, setting).read(*span) for span in ((0, 6), (6, 7), (7, 13))], dim=2)
            assert (found - expected).abs().max() <= 1e-5
        exact = TiledVAE(vae, policy="bands", wrap=wrap).decode(z)
        found = TiledVAE(vae, policy="bands", wrap=wrap, band_px=5, attention=policy).decode(z)
    assert (found - exact).square().mean().sqrt() > 0.005 * exact.std(), "an approximation differs"


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS])
@pytest.mark.parametrize("policy", [Global(), *POLICIES], ids=str)
def test_every_backend_gives_the_policys_picture_or_its_reason(backend: str, policy: Policy) -> None:
    vae, z = small_vae(), torch.randn(1, 4, 13, 11, generator=torch.Generator().manual_seed(1))
    chosen = next(b for b in BACKENDS if b.name == backend)
    spec = AttentionSpec(device="cpu", dtype=torch.float32, head_dim=16, queries=143, keys=143, masked=False)
    with torch.inference_mode():
        expected = TiledVAE(vae, policy="bands", band_px=5, attention=policy).decode(z)
        asked = TiledVAE(vae, policy="bands", band_px=4, attention=policy, backend=backend)
        if chosen.why_not(spec) is not None:
            with pytest.raises(BackendRefused, match=backend):
                asked.decode(z)
            return
        close(asked.decode(z), expected, expected.double())


def test_scores_are_not_scaled_in_an_autoencoder() -> None:
    with pytest.raises(RequestError, match="scores are not scaled"):
        TiledVAE(small_vae(), attention=Global(trained=64))
    with pytest.raises(RequestError, match="give one of the two"):
        TiledVAE(small_vae(), attention=NPA(8), attention_window=5)


def test_a_window_of_rows_is_an_approximation_that_any_band_gives_the_same() -> None:
    vae, z = small_vae(), torch.randn(1, 4, 12, 9)
    with torch.inference_mode():
        exact = TiledVAE(vae, policy="bands").decode(z)
        drawn = [
            TiledVAE(vae, policy=policy, band_px=rows, attention_window=5).decode(z)
            for policy, rows in (("whole", 64), ("bands", 4), ("recompute_conv", 3), ("host", 5))
        ]
        everything = TiledVAE(vae, policy="host", band_px=4, attention_window=12).decode(z)
    for other in drawn[1:]:
        close(other, drawn[0], drawn[0].double())
    assert (drawn[0] - exact).square().mean().sqrt() > 0.01 * exact.std(), "five of twelve rows are not all of them"
    close(everything, exact, exact.double())
    first = TiledVAE(vae, attention_window=5).plan(64, 64)[0]
    assert "approximation: attention rows:5 in cells of latents" in str(first)
    assert TiledVAE(vae).plan(64, 64)[0].flops - first.flops == 4 * 16 * 64 * 64 * (64 - 5) * 64


def test_no_gradients_are_kept_and_a_batch_costs_its_number() -> None:
    vae, z = small_vae(), torch.randn(3, 4, 8, 5)
    assert not TiledVAE(vae, policy="bands").decode(z).requires_grad
    assert not TiledVAE(vae, policy="bands").encode(torch.randn(1, 3, 16, 10)).requires_grad
    tiled = TiledVAE(vae)
    one, three = tiled.plan(256, 256)[1], tiled.plan(256, 256, batch=3)[1]
    assert three.peak_bytes == 3 * one.peak_bytes
    small = TiledVAE(vae, budget_bytes=one.peak_bytes)
    assert one in small.plan(256, 256)
    assert all(way.policy != "bands" and way.peak_bytes <= one.peak_bytes for way in small.plan(256, 256, batch=3))


def test_no_operator_is_handed_more_than_32_bits_can_count() -> None:
    tiled = TiledVAE(small_vae(), budget_bytes=10**13)
    assert tiled.plan(1024, 1024)[0].policy == "whole"
    assert tiled.plan(8192, 8192)[0].policy == "bands"
    assert tiled.plan(1024, 1024, batch=40)[0].policy == "bands"


def test_what_bands_do_not_run_is_refused_and_what_a_module_does_by_itself_is_undone() -> None:
    vae, z = small_vae(), torch.randn(1, 4, 40, 40)
    with torch.inference_mode():
        wanted = vae.decode(z).sample  # type: ignore[operator]
        vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 16  # type: ignore[assignment]
        vae.enable_tiling()  # type: ignore[operator]
        assert (vae.decode(z).sample - wanted).abs().max() > 1e-3  # type: ignore[operator]
        close(TiledVAE(vae, policy="whole").decode(z), wanted, wanted.double())
        vae.disable_tiling()  # type: ignore[operator]
        for part in vae.modules():
            if isinstance(part, nn.Conv2d):
                part.padding_mode = "circular"
                part._reversed_padding_repeated_twice = [p for side in reversed(part.padding) for p in (side, side)]  # type: ignore[assignment]
        circular = vae.decode(z).sample  # type: ignore[operator]
        assert (circular - wanted).abs().max() > 1e-3
        for policy in ("whole", "bands"):
            close(TiledVAE(vae, policy=policy, band_px=8).decode(z), circular, circular.double())
            close(TiledVAE(vae, policy=policy, band_px=8, wrap=(False, False)).decode(z), wanted, wanted.double())
    vae.decoder.up_blocks[0].attentions = nn.ModuleList([nn.Identity()])  # type: ignore[union-attr]
    with pytest.raises(RequestError, match="attention outside the mid block"):
        TiledVAE(vae, policy="bands").decode(z)


def test_bad_arguments() -> None:
    with pytest.raises(RequestError, match="attention_window=0"):
        TiledVAE(small_vae(), attention_window=0)
    with pytest.raises(RequestError, match=r"unknown VAE policy 'bandz'.*bands"):
        TiledVAE(small_vae(), policy="bandz")
    with pytest.raises(RequestError, match="band_px=0"):
        TiledVAE(small_vae(), band_px=0)


@pytest.mark.parametrize("policy", ["whole", "bands", "recompute_conv", "host"])
@pytest.mark.parametrize("where", ["conv1", "conv2"])
def test_half_precision_overflow_is_computed_again(policy: str, where: str) -> None:
    vae = small_vae(attention=where == "conv2")
    with torch.no_grad():
        getattr(vae.decoder.mid_block.resnets[0], where).weight.mul_(3e5)
    z = torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        wanted = vae.decode(z).sample  # type: ignore[operator]
        vae.half()
        assert not vae.decode(z.half()).sample.isfinite().all()  # type: ignore[operator]
        tiled = TiledVAE(vae, policy=policy, band_px=3)
        found = tiled.decode(z.half())
    assert tiled.last is not None
    assert tiled.last.recomputed == tiled.recomputed > 0
    assert found.isfinite().all()
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.std()


def test_an_offload_hook_brings_the_module_to_its_device_first() -> None:
    class Hook:
        calls = 0

        def pre_forward(self, module: nn.Module) -> None:
            self.calls += 1
            module.double()

    vae, hook = small_vae(), Hook()
    z = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    vae._hf_hook = hook  # type: ignore[assignment]
    pixels = TiledVAE(vae, policy="bands", band_px=4).decode(z)
    assert hook.calls >= 1
    assert pixels.dtype == torch.float64
    torch.testing.assert_close(pixels, small_vae().double().decode(z).sample, rtol=0, atol=1e-10)


def test_layers_that_come_one_by_one_are_refused() -> None:
    vae = small_vae()
    vae.decoder.conv_in.to("meta")
    with pytest.raises(RequestError, match="enable_model_cpu_offload"):
        TiledVAE(vae, policy="bands").decode(torch.randn(1, 4, 4, 4))
