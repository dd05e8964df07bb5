"""FLOPs and bytes against the counts of full-size networks, op by op, on meta and fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from hires.checkpoints.families import PixArtShape, UNetShape
from hires.planning.costs.flops import network_flops, pixart_flops, unet_flops
from hires.planning.costs.network_memory import network_live_bytes
from hires.tiling.bands.memory import VaeShape
from hires.tiling.bands.storage import vae_decode_flops, vae_encode_flops, vae_live_bytes
from hires.tiling.geometry import Size

UNET = UNetShape(channels=(320, 640, 1280), resnets=2, transformer_layers=(0, 2, 10), context_width=2048, latent_channels=4)
PIXART = PixArtShape(layers=28, heads=16, head_dim=72, patch=2, caption_width=4096, latent_channels=4)
VAE = VaeShape(channels=(128, 256, 512, 512), resnets=2, latent_channels=4, mid_attention=True)


@pytest.mark.parametrize(
    ("side", "unet", "decode", "encode"),
    [
        (512, 1.6, 2.5, 1.1),
        (1024, 6.8, 10.5, 4.9),
        (2048, 35.9, 48.5, 26.1),
        (4096, 287.8, 299.5, 210.0),
        (8192, 3459.9, 2886.7, 2528.9),
    ],
)
def test_flops_of_the_full_networks(side: int, unet: float, decode: float, encode: float) -> None:
    cells = side // 8
    assert unet_flops(UNET, cells, cells) / 1e12 == pytest.approx(unet, abs=0.06)
    assert vae_decode_flops(VAE, cells, cells) / 1e12 == pytest.approx(decode, abs=0.06)
    assert vae_encode_flops(VAE, cells, cells) / 1e12 == pytest.approx(encode, abs=0.06)


def test_live_bytes_of_the_full_networks() -> None:
    gib = 2**30
    assert network_live_bytes(UNET, Size(128, 128), 1, 2, cpu=False) / gib == pytest.approx(0.15, abs=0.01)
    assert vae_live_bytes(VAE, 2048**2, 2, cpu=False) / gib == pytest.approx(6.0, abs=0.01)
    assert vae_live_bytes(VAE, 2048**2, 2, cpu=False, encode=True) / gib == pytest.approx(
        5.0 + 0.023, abs=0.01
    )  # and the picture


def test_the_formula_counts_what_runs() -> None:
    """The shipped UNet's convolutions and matrix products, counted by torch, within 2 %."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from hires.checkpoints.spec import load_spec
    from hires.models.loading import load_network

    spec = load_spec("demo")
    unet = load_network(spec, torch.float32, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        unet(
            torch.zeros(1, 4, 24, 32),
            torch.zeros(1),
            encoder_hidden_states=torch.zeros(1, 77, spec.network.context_width),
            added_cond_kwargs={"text_embeds": torch.zeros(1, 128), "time_ids": torch.zeros(1, 6)},
        )
    assert unet_flops(spec.network, 24, 32) == pytest.approx(counter.get_total_flops(), rel=0.02)


def full_pixart(layers: int, thin: tuple[int, ...] = (), sized: bool = False) -> Any:
    """The transformer at full width on whatever device and dtype are the default, behind its adapter."""
    from diffusers import PixArtTransformer2DModel

    from hires.models.pixart import PixArtNetwork

    model = PixArtTransformer2DModel(
        num_layers=layers, caption_channels=4096, sample_size=128, use_additional_conditions=sized
    ).eval()  # fmt: skip
    return PixArtNetwork(model, span=32.0, thin=thin)


def evaluate(network: Any, side_px: int, batch: int, tokens: int, dtype: Any = None) -> None:
    """One evaluation of a square picture, its conditions made first."""
    import torch

    from hires.sampling.conditioning import Conditioning
    from hires.tiling.geometry import Size

    cells = side_px // 8
    cond = Conditioning(
        tokens=torch.empty(batch, tokens, 4096, dtype=dtype), mask=torch.empty(batch, tokens).bool(), canvas=Size(cells, cells)
    )
    network(torch.empty(batch, 4, cells, cells), 500.0, cond)


@pytest.mark.parametrize(
    ("side", "half", "published"),
    [
        (1024, False, 6.6),
        (2048, True, 39),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2048, False, 52.4), (4096, False, 624.9), (4096, True, 417), (8192, False, 9149.4))
        ),
    ],
)
def test_flops_of_the_full_transformer(side: int, half: bool, published: float) -> None:
    """Every matrix product of all 28 blocks on meta tensors, within 1 %; and the published totals in TFLOP."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    thin = (1,) * 14 + (2,) * 14 if half else ()
    shape = PixArtShape(
        layers=28, heads=16, head_dim=72, patch=2, caption_width=4096, latent_channels=4, kv_compression=thin
    )  # fmt: skip
    predicted = pixart_flops(shape, side // 8, side // 8, 300)
    assert predicted / 1e12 == pytest.approx(published, rel=0.01)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        evaluate(full_pixart(28, thin), side, 1, 300)
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_attention_is_most_of_a_4k_evaluation() -> None:
    whole = pixart_flops(PIXART, 512, 512, 300)
    tokens = 256 * 256
    assert whole - 4.0 * 28 * 1152 * tokens * tokens == pytest.approx(
        70.7e12, rel=0.01
    )  # 554 of the 625 are the scores' and values'
    assert 4.0 * 28 * 1152 * tokens * tokens == pytest.approx(554e12, rel=0.001)


@pytest.mark.parametrize(
    ("side", "batch", "tokens"),
    [(1024, 1, 300), (128, 4, 300), (256, 2, 120), (512, 3, 120), (2048, 1, 300), (2048, 2, 300), (4096, 1, 300)],
)
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_live_bytes_of_the_full_transformer_are_enough_and_not_many_more(side: int, batch: int, tokens: int, name: str) -> None:
    """What operators allocate in two blocks of full width, on fake tensors; more blocks hold no more."""
    import torch

    from benchmarks.allocations import counted

    dtype = getattr(torch, name)
    with counted() as found:
        torch.set_default_dtype(dtype)
        try:
            network = full_pixart(2)
        finally:
            torch.set_default_dtype(torch.float32)
        found.live = found.peak = 0
        evaluate(network, side, batch, tokens, dtype)
    predicted = network_live_bytes(PIXART, Size(side // 8, side // 8), batch, dtype.itemsize, cpu=False, tokens=tokens)
    assert found.peak <= predicted <= 1.10 * found.peak


def test_the_formula_counts_the_full_sd15_network() -> None:
    """Its mid block attends where its last level does not, and its heads are as wide as a level is."""
    import json

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from hires._imports import quiet_imports
    from hires.checkpoints.configs import shipped_config
    from hires.checkpoints.families import FAMILIES
    from hires.checkpoints.spec import unet_shape

    with quiet_imports():
        from diffusers import UNet2DConditionModel
    config = json.loads(shipped_config("sd15", "unet").read_text())
    shape = unet_shape(config, FAMILIES["sd15"])
    assert shape.head_dims == (40, 80, 160, 160)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).eval()
        x, words, time = torch.empty(1, 4, 64, 48), torch.empty(1, 77, 768), torch.ones(1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
            unet(x, time, encoder_hidden_states=words)
    assert unet_flops(shape, 64, 48) == pytest.approx(counter.get_total_flops(), rel=0.01)


def controlled(cells: int, batch: int, dtype: Any) -> tuple[Any, Any, Any]:
    """Two copies beside four blocks of full width, latents and conditions, on the default device."""
    import copy

    import torch

    from hires.models.adapters.controlnet import ControlBlock
    from hires.models.pixart import PixArtNetwork
    from hires.sampling.conditioning import Conditioning
    from hires.tiling.geometry import Size

    base = full_pixart(4).transformer
    copies = [ControlBlock(copy.deepcopy(base.transformer_blocks[i]), 1152, i == 0) for i in range(2)]
    cond = Conditioning(
        tokens=torch.empty(batch, 120, 4096, dtype=dtype),
        mask=torch.empty(batch, 120).bool(),
        canvas=Size(cells, cells),
        image_latents=torch.empty(batch, 4, cells, cells, dtype=dtype),
    )
    return PixArtNetwork(base, span=32.0, control=copies), torch.empty(batch, 4, cells, cells, dtype=torch.float32), cond


CONTROLLED = replace(PIXART, layers=4, control_blocks=2)


@pytest.mark.parametrize(("side", "batch"), [(512, 1), (1024, 2), (2048, 1)])
def test_live_bytes_of_a_controlled_transformer(side: int, batch: int) -> None:
    """The carried map and the steered one are in the prediction."""
    import torch

    from benchmarks.allocations import counted

    cells = side // 8
    with counted() as found:
        torch.set_default_dtype(torch.bfloat16)
        try:
            network, x, cond = controlled(cells, batch, torch.bfloat16)
        finally:
            torch.set_default_dtype(torch.float32)
        before = found.live
        found.peak = 0
        network(x, 1.0, cond)
    inputs = sum(t.numel() * t.element_size() for t in (x, cond.tokens, cond.mask, cond.image_latents))
    predicted = network_live_bytes(CONTROLLED, Size(cells, cells), batch, 2, cpu=False, tokens=120)
    assert found.peak - before + inputs <= predicted <= 1.10 * (found.peak - before + inputs)


def test_flops_of_a_controlled_transformer() -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        network, x, cond = controlled(128, 1, None)
        network(x, 1.0, cond)
    assert network_flops(CONTROLLED, 128, 128, 120) == pytest.approx(counter.get_total_flops(), rel=0.01)


def full_unet(backend: str | None = None, changes: Mapping[str, object] | None = None) -> Any:
    """The UNet of SDXL, or one whose config has `changes`, on the default device, behind its adapter."""
    import json

    import torch

    from hires._imports import quiet_imports
    from hires.checkpoints.configs import shipped_config
    from hires.models.attention_processors import dispatch_attention
    from hires.models.unet import UNetNetwork

    with quiet_imports():
        from diffusers import UNet2DConditionModel
    config = json.loads(shipped_config("sdxl", "unet").read_text()) | dict(changes or {})
    return UNetNetwork(dispatch_attention(UNet2DConditionModel.from_config(config).eval(), backend), torch.float32)


# Canvas, window in cells (None: whole), and TFLOP of methods.md 3.2. PixArt's 2K checkpoint has windows of 256 cells.
PER_CANVAS = [
    ("unet", 2048, None, 36), ("unet", 4096, None, 288), ("unet", 8192, None, 3460),
    ("unet", 2048, 128, 27), ("unet", 4096, 128, 107), ("unet", 8192, 128, 429),
    ("pixart", 2048, None, 52.4), ("pixart", 4096, None, 625), ("pixart", 8192, None, 9149),
    ("pixart", 2048, 128, 26), ("pixart", 4096, 128, 105), ("pixart", 8192, 128, 422),
    ("pixart", 4096, 256, 209), ("pixart", 8192, 256, 837),
]  # fmt: skip


HEAVY = tuple(case for case in PER_CANVAS if case[:3] not in (("pixart", 2048, 128), ("pixart", 4096, None)))


@pytest.mark.parametrize(
    ("model", "side", "window", "published"),
    [pytest.param(*case, marks=pytest.mark.slow) if case in HEAVY else case for case in PER_CANVAS],
)
def test_flops_of_an_evaluation_by_policy(model: str, side: int, window: int | None, published: float) -> None:
    """One full-size evaluation, the calls of its attention counted op by op on meta tensors, within 3 % of the reference
    (which is rounded to whole TFLOP) and 1 % of the formula."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from hires.kernels.attention_policies import NPA, Global
    from hires.sampling.conditioning import Conditioning
    from hires.tiling.geometry import Size

    policy, cells = Global() if window is None else NPA(window), side // 8
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        network = full_unet("sdpa") if model == "unet" else full_pixart(28)
        words, width, sizes = (77, 2048, 6) if model == "unet" else (300, 4096, 2)
        cond = Conditioning(
            tokens=torch.empty(1, words, width), mask=None, canvas=Size(cells, cells), pooled=torch.empty(1, 1280),
            size_ids=torch.empty(1, sizes),
        )  # fmt: skip
        network.attending(lambda time: policy)(torch.empty(1, 4, cells, cells), 500.0, cond)
    predicted = network_flops(UNET if model == "unet" else PIXART, cells, cells, words, policy)
    print(f"{model} {side} {policy}: {counter.get_total_flops() / 1e12:.1f} TFLOP counted, {predicted / 1e12:.1f} predicted")
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert counter.get_total_flops() / 1e12 == pytest.approx(published, rel=0.03)


@pytest.mark.parametrize(
    ("name", "side"),
    [("KOALA-700M", 1024), *(pytest.param(n, 2048, marks=pytest.mark.slow) for n in ("SSD-1B", "Segmind-Vega", "KOALA-1B"))],
)
def test_costs_of_thinner_unets_are_counted_block_by_block(name: str, side: int) -> None:
    """FLOPs and live bytes of one full-size evaluation of the published layouts, counted op by op."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.allocations import counted
    from hires.checkpoints.families import FAMILIES
    from hires.checkpoints.spec import unet_shape
    from tests.support.checkpoints import shipped
    from tests.support.headers import LAYOUTS

    changes, cells = LAYOUTS[name], side // 8
    shape = unet_shape(shipped("sdxl/unet") | changes, FAMILIES["sdxl"])
    with torch.device("meta"), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        evaluate_unet(full_unet("sdpa", changes), cells, torch.float32)
    assert unet_flops(shape, cells, cells) == pytest.approx(counter.get_total_flops(), rel=0.01)
    with counted() as found:
        network = full_unet("sdpa", changes)
        found.live = found.peak = 0
        evaluate_unet(network, cells, torch.float32)
    predicted = network_live_bytes(shape, Size(cells, cells), 1, 4, cpu=False)
    assert found.peak <= predicted <= 1.1 * found.peak


def evaluate_unet(network: Any, cells: int, dtype: Any) -> None:
    """One evaluation of a square picture by a UNet with size conditions."""
    import torch

    from hires.sampling.conditioning import Conditioning

    cond = Conditioning(
        tokens=torch.empty(1, 77, 2048, dtype=dtype),
        canvas=Size(cells, cells),
        pooled=torch.empty(1, 1280, dtype=dtype),
        size_ids=torch.empty(1, 6, dtype=dtype),
    )
    network(torch.empty(1, 4, cells, cells), 500.0, cond)
