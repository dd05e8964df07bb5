"""Packed layers: forwards, loading, LoRAs, offloading, float32, and the autoencoder in bands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hires.checkpoints.containers.layers import KEPT_CHANNELS, count_layers
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError
from hires.kernels.single_precision import in_single
from hires.models.adapters.controlnet import load_control
from hires.models.loading import Home, load_network, load_vae, remerge_network
from hires.models.offload import stream
from hires.models.storage.layers import packed_layers, packing_errors, unpacked_copy, without_weight
from hires.options.lora import LoraRef
from hires.planning.costs.weights import stored_bytes
from hires.tiling.vae import TiledVAE
from tests.models.adapters.test_controlnet import COPIES, Made
from tests.models.test_loading import output
from tests.support.checkpoints import Checkpoint, lora

Get = Callable[..., Checkpoint]
CPU = torch.device("cpu")
STORAGES = ["fp8", "int8", "nf4"]


def held(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.parameters())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_a_forward_is_that_of_the_widened_weight(storage: str, dtype: torch.dtype, last: bool) -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(35, 40), nn.Linear(36, 40, bias=False), nn.Conv2d(35, 40, 3, stride=2, padding=1)):
        bare = without_weight(layer)
        bare.hold(layer.weight.detach(), storage, dtype, CPU)
        packed = bare.to(dtype) if layer.bias is not None else bare
        x = (
            torch.randn(2, 35, 9, 7, dtype=dtype)
            if isinstance(layer, nn.Conv2d)
            else torch.randn(2, layer.in_features, dtype=dtype)
        )
        bias = None if layer.bias is None else layer.bias.to(dtype)
        if isinstance(layer, nn.Conv2d):
            packed = packed.to(memory_format=torch.channels_last) if last else packed
            wanted = F.conv2d(x, packed.weight, bias, 2, 1)
        else:
            wanted = F.linear(x, packed.weight, bias)
        assert packed.weight.dtype == dtype and isinstance(packed, type(layer))
        with torch.no_grad():
            assert torch.equal(packed(x), wanted)


@pytest.mark.parametrize(
    ("family", "layout"), [("cosxl", "file"), ("pixart-sigma-256", "file"), ("pixart-alpha-1024", "folder")]
)
def test_every_family_takes_packed_weights_in_the_bytes_predicted(family: str, layout: str, checkpoint: Get) -> None:
    made = checkpoint(family, layout)
    spec = load_spec(str(made.path), parts=made.parts)
    exact = output(load_network(spec, torch.float32, CPU), family)
    for storage, limit in (("int8", 0.05), ("fp8", 0.15), ("nf4", 0.6)):
        network = load_network(spec, torch.float32, CPU, storage=storage)
        with torch.inference_mode():
            found = output(network, family)
        assert 0 < float((found - exact).norm() / exact.norm()) < limit, storage
        assert len(packing_errors(network)) > 5 and max(packing_errors(network).values()) < 0.2
        assert held(network) == stored_bytes(spec.network_count, storage, 4)
        assert network.dtype == torch.float32
    vae = load_vae(spec, torch.bfloat16, CPU, "int8")
    assert held(vae) == stored_bytes(spec.vae_count, "int8", 2) and next(vae.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_other_loras_on_packed_weights_are_a_fresh_load(storage: str, tmp_path: Path, checkpoint: Get) -> None:
    """Merged in float32 and packed then; changed in place, to other LoRAs and to none, bit for bit."""
    made = checkpoint("sdxl")
    spec, tiny = load_spec(str(made.path)), lora(tmp_path / "a.safetensors", made, "kohya", texts=False)
    weak, strong = [LoraRef(str(tiny.path), 0.4)], [LoraRef(str(tiny.path), 0.9)]
    fresh = {len(refs): load_network(spec, torch.float32, CPU, refs, storage) for refs in ([], strong)}
    used = load_network(spec, torch.float32, CPU, weak, storage)
    for before, after in ((weak, strong), (strong, [])):
        used, wanted = remerge_network(used, spec, before, after), fresh[len(after)]
        state = wanted.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in used.state_dict().items())
        assert packing_errors(used) == packing_errors(wanted)
    plain = made.network.state_dict()
    for name, layer in packed_layers(fresh[1]):
        merged = plain[name] + 0.9 * tiny.deltas["network"][name]
        assert float((layer.weight - merged).norm() / merged.norm()) == pytest.approx(layer.error, rel=1e-3), name


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, checkpoint: Get) -> None:
    state = load_file(checkpoint("sdxl").path)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    state[name][0, 0, 0, 0] = torch.inf
    save_file(state, tmp_path / "a.safetensors")
    spec = load_spec(str(tmp_path / "a.safetensors"))
    with pytest.raises(ModelError, match=r"mid_block\.resnets\.0\.conv1\.weight holds NaN or infinity.*leave `weights` out"):
        load_network(spec, torch.float32, CPU, storage="nf4")


def test_copies_of_a_controlnet_are_packed_like_their_base(tmp_path: Path) -> None:
    made = Made(tmp_path)
    spec, home = made.spec(), Home(device=CPU, dtype=torch.float32, storage="int8")
    base = load_network(spec, home.dtype, CPU, storage=home.storage)
    copies = load_control(spec, base, home)
    assert len(copies) == COPIES and all([*packed_layers(each)] for each in copies)
    assert held(base) + sum(map(held, copies)) == stored_bytes(spec.network_count, "int8", 4)
    for found, wanted in zip(copies, made.copies, strict=True):
        packed = found.copied_block.attn1.to_q
        assert (packed.weight - wanted.attn1.to_q.weight).abs().max() < 0.02
    bare = unpacked_copy(base)
    assert {name: value.shape for name, value in bare.state_dict().items()} == {
        name: value.shape for name, value in made.base.state_dict().items()
    }


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_layers_that_are_fetched_one_by_one_and_float32_give_the_same(storage: str, checkpoint: Get) -> None:
    spec = load_spec(str(checkpoint("sdxl").path))
    network = load_network(spec, torch.float32, CPU, storage=storage)
    with torch.inference_mode():
        wanted = output(network, "sdxl")
        streamed = copy.deepcopy(network)
        stream(streamed, CPU)
        assert torch.equal(output(streamed, "sdxl"), wanted)
    half: Any = load_network(spec, torch.bfloat16, CPU, storage=storage)
    layer = half.mid_block.resnets[0].conv1
    x = torch.randn(1, layer.in_channels, 4, 4)
    with torch.inference_mode(), in_single(half):
        assert torch.equal(layer(x), F.conv2d(x, layer.weight.float(), layer.bias.float(), padding=1))


@pytest.mark.parametrize("policy", ["bands", "recompute_conv", "host"])
def test_a_packed_autoencoder_in_bands_is_the_whole_one(policy: str, checkpoint: Get) -> None:
    vae: Any = load_vae(load_spec(str(checkpoint("sdxl").path)), torch.float32, CPU, "int8")
    assert [*packed_layers(vae)]
    latents = torch.randn(1, 4, 9, 6, generator=torch.Generator().manual_seed(1))
    tiled = TiledVAE(vae, policy=policy, band_px=16)
    with torch.inference_mode():
        whole = vae.decode(latents).sample
        assert (tiled.decode(latents) - whole).abs().max() <= 1e-4
        picture = whole.clamp(-1, 1)
        assert (tiled.encode(picture) - vae.encode(picture).latent_dist.mean).abs().max() <= 1e-4


def test_first_and_last_layers_keep_their_type(checkpoint: Get) -> None:
    network: Any = load_network(load_spec(str(checkpoint("sdxl").path)), torch.float32, CPU, storage="nf4")
    assert type(network.conv_in) is type(network.conv_out) is nn.Conv2d
    assert count_layers([("a.weight", (KEPT_CHANNELS, 99)), ("b.weight", (99, 4, 3, 3)), ("c.bias", (99, 99))]).packable == 0
    assert count_layers([("a.weight", (33, 35))]).blocks == 19 and count_layers([("a.weight", (33, 35))]).packable == 33 * 35
