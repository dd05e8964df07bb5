"""What only a card can show: kernels on it, the autoencoder within a cap, renders in its types. HIRES_TEST_GPU=1 runs them.

HIRES_TEST_GPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(
    not os.environ.get("HIRES_TEST_GPU") or not torch.cuda.is_available(), reason="no CUDA card, or HIRES_TEST_GPU is not set"
)

import hires  # noqa: E402
from hires.kernels import group_norm  # noqa: E402
from hires.kernels.attention_policies import (  # noqa: E402
    NPA,
    Global,
    Windows,
)
from hires.kernels.dispatch import BACKENDS, attention, spec_of  # noqa: E402
from hires.kernels.reference import attention_chunked  # noqa: E402
from hires.metrics.fidelity import psnr  # noqa: E402
from hires.tiling.vae import TiledVAE  # noqa: E402

CARD = torch.device("cuda:0")
TYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture
def most() -> Iterator[object]:
    """Caps the allocator: most(bytes)."""

    def cap(count: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, count / torch.cuda.get_device_properties(CARD).total_memory), CARD)

    yield cap
    torch.cuda.set_per_process_memory_fraction(1.0, CARD)


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "width", "canvas"), [(10, 64, (40, 56)), (16, 72, (32, 48)), (1, 512, (24, 40))])
def test_every_backend_is_as_exact_as_its_type(
    backend: str, dtype: torch.dtype, heads: int, width: int, canvas: tuple[int, int]
) -> None:
    generator = torch.Generator(CARD).manual_seed(0)
    shape = (1, canvas[0] * canvas[1], heads, width)
    q, k, v = (torch.randn(shape, generator=generator, device=CARD).to(dtype).transpose(1, 2) for _ in range(3))
    exact = attention_chunked(q.double(), k.double(), v.double(), None, width**-0.5)
    for policy in (Global(), NPA(16), Windows(16)):
        reason = next(b for b in BACKENDS if b.name == backend).why_not(spec_of(q, k, v, canvas=canvas, policy=policy))
        if reason is not None:
            continue
        found = attention(q, k, v, canvas=canvas, policy=policy, backend=backend)
        if policy == Global():
            torch_own = F.scaled_dot_product_attention(q, k, v)
            assert off(found, exact) <= 2 * off(torch_own, exact) + 1e-7
        else:
            plain = attention(*(x.double().cpu() for x in (q, k, v)), canvas=canvas, policy=policy, backend="math")
            assert off(found.cpu(), plain) <= 4 * off(F.scaled_dot_product_attention(q, k, v), exact) + 1e-6


@pytest.mark.parametrize("backend", [backend.name for backend in group_norm.STATS])
@pytest.mark.parametrize("dtype", TYPES)
def test_group_norm(backend: str, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 96, 33, 70, device=CARD, generator=torch.Generator(CARD).manual_seed(0)) * 3 + 1).to(dtype)
    flat = x.double().reshape(2, 32, -1)
    found = group_norm.group_norm_stats(x, 32, backend=backend)
    assert (found.mean - flat.mean(-1)).abs().max() < 1e-4 and (found.var - flat.var(-1, correction=0)).abs().max() < 1e-3
    scale, shift = (torch.randn(2, 96, 1, 1, device=CARD) for _ in range(2))
    exact = F.silu(x.double() * scale.double() + shift.double())
    assert off(group_norm.group_norm_apply(x, scale, shift, silu=True, backend=backend), exact) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("policy", ["bands", "recompute_up", "recompute_conv", "host"])
def test_the_autoencoder_is_exact_on_a_card(policy: str) -> None:
    from benchmarks.random_models import vae_of

    vae = vae_of(False, "fp32", CARD)
    z = torch.randn(1, 4, 40, 56, generator=torch.Generator().manual_seed(0)).to(CARD)
    with torch.inference_mode():
        whole = vae.decode(z).sample
    found = TiledVAE(vae, policy=policy, band_px=64).decode(z)
    assert (found - whole).abs().max() <= 1e-4 * max(1.0, float(whole.abs().max()))


def test_a_decode_within_a_cap_that_the_whole_does_not_fit(most: object) -> None:
    from benchmarks.random_models import vae_of

    vae = vae_of(False, "bf16", CARD)
    z = torch.randn(1, 4, 256, 256, generator=torch.Generator().manual_seed(0)).to(CARD, torch.bfloat16)
    whole = TiledVAE(vae, policy="bands").decode(z).float().cpu()
    cap = 4 * 10**9
    most(cap)  # type: ignore[operator]
    with pytest.raises(torch.OutOfMemoryError), torch.inference_mode():
        vae.decode(z)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = TiledVAE(vae, budget_bytes=cap - torch.cuda.memory_allocated() - 2**28).decode(z).float().cpu()
    assert torch.cuda.max_memory_reserved() <= cap
    assert psnr(found.numpy(), whole.numpy(), 2.0) > 45


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_renders_of_a_card_are_those_of_the_cpu(dtype: str) -> None:
    options = {"size": "512x384", "seed": 3}
    here = hires.render("a sun on the right over green mountains", device="cpu", **options).pixels
    there = hires.render("a sun on the right over green mountains", device="cuda:0", dtype=dtype, **options).pixels
    assert psnr(there.astype(np.float32), here.astype(np.float32), 255.0) > (38 if dtype == "fp32" else 24)


def test_the_same_picture_for_any_budget() -> None:
    options = {"size": "640x512", "seed": 3, "device": "cuda:0", "dtype": "fp32"}
    pictures = [hires.render("a lake at dusk", vram=vram, **options).pixels.astype(np.float32) for vram in ("24GB", "1GB")]
    assert psnr(pictures[0], pictures[1], 255.0) > 60
