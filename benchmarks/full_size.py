"""Full-size models without weights: their specs for the planner, and the FLOPs of one run on tensors that hold nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.suites.planner import PIXART, VAE, network_bytes, network_shape, vae_bytes
from hires.checkpoints.containers.layers import LayerCount
from hires.checkpoints.families import FAMILIES, VAE_COUNT
from hires.checkpoints.model import ModelSpec, sigma_table
from hires.checkpoints.spec import load_spec
from hires.kernels.attention_policies import EVERYWHERE, Policy
from hires.planning.plan import DecodePlan
from hires.tiling.geometry import Size

PARAMS = {"cosxl": (2_567_463_684, 817_755_520), "pixart": (610_856_096, 4_762_310_656)}

COUNTS = {
    "cosxl": LayerCount(values=2_567_463_684, packable=2_565_857_280, rows=1_494_080, blocks=40_091_520, largest=29_491_200),
    "pixart": LayerCount(values=610_856_096, packable=610_172_928, rows=430_848, blocks=9_533_952, largest=7_962_624),
}


@lru_cache
def full_spec(family: str) -> ModelSpec:
    """The facts of a published checkpoint of that family ('cosxl', 'pixart-sigma-2k', ...), without its files."""
    facts = FAMILIES[family]
    pixart = facts.network == "pixart"
    network, text = PARAMS["pixart" if pixart else "cosxl"]
    align = 16 if pixart else 32
    spec = replace(
        load_spec("demo"),
        name=family,
        facts=facts,
        parameterisation=facts.parameterisation,
        vp_betas=facts.betas,
        latent_scale=facts.latent_scale,
        native_px=facts.native_px,
        align_px=align,
        network=PIXART if pixart else network_shape("cosxl"),
        vae=VAE,
        network_params=network,
        text_params=text,
        vae_params=VAE_COUNT.values,
        network_count=COUNTS["pixart" if pixart else "cosxl"],
        vae_count=VAE_COUNT,
        defaults=facts.defaults,
        notes=(),
    )
    table = sigma_table(spec)
    low, high = facts.sigma_range or ((table[0], table[-1]) if table else (0.002, 120.0))
    return replace(spec, sigma_min=low, sigma_max=high)


def counted_flops(run: Callable[[], object]) -> float:
    """FLOPs of matrix products and convolutions, two for a multiplication with addition."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.inference_mode():
        run()
    return float(counter.get_total_flops())


@lru_cache
def network_flops(family: str, cells: Size, policy: Policy = EVERYWHERE) -> float:
    """Of one estimate of one tile."""
    model = "pixart" if FAMILIES[family].network == "pixart" else "cosxl"
    return counted_flops(lambda: network_bytes(model, cells, 1, policy, "bf16", PIXART.layers))


@lru_cache
def vae_flops(cells: Size, decode: DecodePlan, encode: bool) -> float:
    """Of decoding or encoding a picture of so many cells in the plan's way, which may compute maps twice to hold fewer."""
    return counted_flops(lambda: vae_bytes(cells, decode.policy, decode.band_rows, decode.dtype, encode))
