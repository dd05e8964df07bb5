"""FLOPs against the counts of full-size SDXL networks, op by op, on meta tensors (published in TFLOP, two digits)."""

from __future__ import annotations

import pytest

from hires.cost import unet_flops, unet_live_bytes, vae_decode_flops, vae_encode_flops, vae_live_bytes
from hires.families import UNetShape, VaeShape

UNET = UNetShape(channels=(320, 640, 1280), resnets=2, transformer_layers=(0, 2, 10), context_width=2048, latent_channels=4)
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
    assert unet_live_bytes(UNET, 128 * 128, 1, 2, cpu=False) / gib == pytest.approx(0.15, abs=0.01)
    assert vae_live_bytes(VAE, 2048**2, 2, cpu=False) / gib == pytest.approx(6.0, abs=0.01)
    assert vae_live_bytes(VAE, 2048**2, 2, cpu=False, encode=True) / gib == pytest.approx(5.0, abs=0.01)


def test_the_formula_counts_what_runs() -> None:
    """The shipped UNet's convolutions and matrix products, counted by torch, within 2 %."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from hires.specs import load_spec
    from hires.weights import load_network

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
