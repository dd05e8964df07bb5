"""Loading: the network of every family and layout gives the outputs of the module that the file was made from."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hires.checkpoints.configs import CONFIGS, clip_config, ldm_unet_config, ldm_vae_config, pixart_config, shipped_config
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError
from hires.models.loading import load_autoencoder, load_network, load_vae, read_kv_compression
from tests.support.checkpoints import Checkpoint, make, seeded, shipped
from tests.support.headers import LAYOUTS, NARROW
from tests.support.original_names import clip_to_ldm, clip_to_openclip, pixart_to_pth, unet_to_ldm, vae_to_ldm

Get = Callable[..., Checkpoint]
CPU = torch.device("cpu")
FILES = ("cosxl", "cosxl-edit", "sdxl", "sd15", "pixart-sigma-256", "pixart-alpha-256", "pixart-alpha-1024", "pixart-sigma-2k")


def output(network: nn.Module, family: str, side: int = 16) -> Tensor:
    """One forward of a tiny network on inputs that depend on the family alone."""
    facts, draw = FAMILIES[family], torch.Generator().manual_seed(3)
    x = torch.randn(2, facts.latent_channels + facts.image_channels, side, side + 8, generator=draw)
    width = {"sdxl": 128, "sd15": 64, "pixart": 32}[facts.configs]
    tokens = torch.randn(2, 9, width, generator=draw)
    time = torch.tensor([-1.5, 700.0])
    if facts.network == "pixart":
        sizes = {"resolution": torch.full((2, 2), 512.0), "aspect_ratio": torch.ones(2, 1)}
        added = sizes if facts.size_conditions else {"resolution": None, "aspect_ratio": None}
        mask = torch.arange(9)[None] < torch.tensor([[4], [9]])
        out = network(x, tokens, timestep=time.abs(), added_cond_kwargs=added, encoder_attention_mask=mask, return_dict=False)
    else:
        ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]] * 2)
        added = {"text_embeds": torch.randn(2, 64, generator=draw), "time_ids": ids}
        out = network(x, time, tokens, added_cond_kwargs=added, return_dict=False)
    result: Tensor = out[0]
    return result


@pytest.mark.parametrize("family", FILES)
def test_a_single_file_gives_the_output_of_the_module_it_was_made_from(family: str, checkpoint: Get) -> None:
    made = checkpoint(family)
    spec = load_spec(str(made.path), parts=made.parts)
    with torch.inference_mode():
        wanted = output(made.network, family)
        got = output(load_network(spec, torch.float32, CPU), family)
        picture = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
        latents = [vae.encode(picture).latent_dist.mean for vae in (made.vae, load_vae(spec, torch.float32, CPU))]
        pixels = [made.vae.decode(latents[0]).sample, load_vae(spec, torch.float32, CPU).decode(latents[0]).sample]
    assert wanted.std() > 0.01
    assert torch.equal(got, wanted)
    assert torch.equal(*latents)
    assert torch.equal(*pixels)


@pytest.mark.parametrize("family", ["cosxl", "sd15", "pixart-sigma-256", "pixart-alpha-1024"])
def test_a_folder_gives_the_output_of_the_module_it_was_made_from(family: str, checkpoint: Get) -> None:
    made = checkpoint(family, "folder")
    network = load_network(load_spec(str(made.path)), torch.float32, CPU)
    with torch.inference_mode():
        assert torch.equal(output(network, family), output(made.network, family))
        if FAMILIES[family].network == "pixart":  # at the trained size: the position table is a buffer that no file holds
            side = made.network.config.sample_size
            x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))
            assert torch.equal(network.pos_embed(x), made.network.pos_embed(x))
            assert not any(buffer.is_meta for buffer in network.buffers())


def test_old_names_of_the_transformer_class_load_with_the_conditions_of_their_keys(tmp_path: Path, checkpoint: Get) -> None:
    """sample_size 128 without a word of size conditions: diffusers would invent them for Σ (and give random weights)."""
    made = checkpoint("pixart-sigma-1024", "folder")
    folder = tmp_path / "model"
    shutil.copytree(made.path, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    del config["use_additional_conditions"]
    config |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "double_self_attention": False}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    network = load_network(load_spec(str(folder)), torch.float32, CPU)
    assert type(network).__name__ == "PixArtTransformer2DModel"
    with torch.inference_mode():
        assert torch.equal(output(network, "pixart-sigma-1024"), output(made.network, "pixart-sigma-1024"))


def test_kv_compression_is_handed_back_apart(tmp_path: Path, checkpoint: Get) -> None:
    made = make(tmp_path, "pixart-sigma-256", kv={1: 2})
    spec = load_spec(str(made.path), parts=made.parts)
    assert spec.network.kv_compression == (1, 2)  # type: ignore[union-attr]
    read = read_kv_compression(spec)
    assert read.keys() == {1}
    assert read[1].keys() == {"sr.weight", "sr.bias", "norm.weight", "norm.bias"}
    assert all(torch.equal(read[1][key], made.kv[1][key]) for key in read[1])
    assert set(load_network(spec, torch.float32, CPU).state_dict()) == set(made.network.state_dict())
    for family in ("cosxl", "pixart-alpha-256"):
        assert read_kv_compression(load_spec(str(checkpoint(family).path))) == {}


def test_weights_arrive_in_the_dtype_asked_for_and_unchanged_when_it_is_theirs(tmp_path: Path) -> None:
    made = make(tmp_path, "sdxl", dtype=torch.float16)
    spec = load_spec(str(made.path), parts=made.parts)
    half, whole = load_network(spec, torch.float16, CPU), load_network(spec, torch.float32, CPU)
    stored = load_file(made.path)["model.diffusion_model.out.2.weight"]
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert torch.equal(half.conv_out.weight, stored)
    assert torch.equal(whole.conv_out.weight, stored.float())
    assert not half.training
    assert not any(p.requires_grad for p in half.parameters())


def test_files_that_lack_or_add_a_tensor_are_refused(tmp_path: Path, checkpoint: Get) -> None:
    state = load_file(checkpoint("sdxl").path)
    stem = "model.diffusion_model."
    lost = {key: value for key, value in state.items() if key != f"{stem}out.2.bias"}
    added = state | {f"{stem}input_blocks.1.0.adapter.weight": torch.ones(3), f"{stem}strange.weight": torch.ones(3)}
    resized = state | {f"{stem}out.0.weight": torch.ones(31)}
    for changed, words in ((lost, "1 missing"), (added, "strange|adapter"), (resized, r"shape \(31,\)")):
        save_file(changed, tmp_path / "a.safetensors")
        with pytest.raises(ModelError, match=words):
            load_network(load_spec(str(tmp_path / "a.safetensors")), torch.float32, CPU)
    pth = torch.load(checkpoint("pixart-sigma-256").path)["state_dict"]
    torch.save(pth | {"blocks.0.attn.q_norm.weight": torch.ones(72)}, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"none of PixArt's, such as blocks\.0\.attn\.q_norm"):
        load_network(load_spec(str(tmp_path / "a.pth")), torch.float32, CPU)


def test_a_vae_that_is_nowhere_says_where_it_was_looked_for(checkpoint: Get) -> None:
    made = checkpoint("pixart-sigma-256")
    with pytest.raises(ModelError, match=r"vae missing \(looked in .*/vae.*give `parts`.*hf download PixArt-alpha/"):
        load_vae(load_spec(str(made.path)), torch.float32, CPU)


def test_an_autoencoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(ModelError, match="AutoencoderDC is not known"):
        load_autoencoder(tmp_path, torch.float32, CPU)


def full_size(component: str) -> nn.Module:
    """A published architecture from its shipped config, on no memory."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    config, name = shipped(component), component.split("/")[1]
    with torch.device("meta"):
        if name == "unet":
            module = UNet2DConditionModel.from_config(config)
        elif name == "vae":
            module = AutoencoderKL.from_config(config)
        elif name.startswith("transformer"):
            module = PixArtTransformer2DModel.from_config(config)
        elif component == "pixart/text_encoder":
            module = T5EncoderModel(T5Config(**config))
        else:
            module = (CLIPTextModelWithProjection if name.endswith("_2") else CLIPTextModel)(CLIPTextConfig(**config))
    result: nn.Module = module
    return result


MILLIONS = {
    "sdxl/unet": 2567.46, "sdxl/text_encoder": 123.06, "sdxl/text_encoder_2": 694.66, "sdxl/vae": 83.65, "sd15/unet": 859.52,
    "sd15/text_encoder": 123.06, "sd15/vae": 83.65, "pixart/vae": 83.65, "pixart/text_encoder": 4762.31,
    "pixart/transformer-sigma-256": 610.86, "pixart/transformer-sigma-512": 610.86, "pixart/transformer-sigma-1024": 610.86,
    "pixart/transformer-sigma-2k": 610.86, "pixart/transformer-alpha-256": 610.86, "pixart/transformer-alpha-512": 610.86,
    "pixart/transformer-alpha-1024": 611.35,
}  # fmt: skip


def test_every_shipped_config_is_counted() -> None:
    assert {str(path.parent.relative_to(CONFIGS)) for path in CONFIGS.rglob("config.json")} == MILLIONS.keys()


@pytest.mark.parametrize("component", MILLIONS)
def test_published_architectures_have_their_published_sizes(component: str) -> None:
    count = sum(p.numel() for p in full_size(component).parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[component], abs=0.005)


def test_configs_read_from_full_size_shapes_are_the_shipped_ones() -> None:
    """The single-file road at full size: names and shapes of the real files give the published configs again."""

    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in state.items()}

    for folder in ("sdxl", "sd15"):
        got = ldm_unet_config(shapes(unet_to_ldm(full_size(f"{folder}/unet"))), shipped_config(folder, "unet"))
        wanted = shipped(f"{folder}/unet")
        if folder == "sd15":
            assert got["transformer_layers_per_block"] == [1] * 4
            got["transformer_layers_per_block"] = 1
        assert got == wanted
        got = ldm_vae_config(shapes(vae_to_ldm(full_size(f"{folder}/vae"))), shipped_config(folder, "vae"))
        assert got == shipped(f"{folder}/vae")
    for tower, names in (("text_encoder", clip_to_ldm), ("text_encoder_2", clip_to_openclip)):
        got = clip_config(shapes(names(full_size(f"sdxl/{tower}"))), shipped_config("sdxl", tower))
        assert got == shipped(f"sdxl/{tower}")
    for name, family in ((f.removeprefix("pixart-"), f) for f in FAMILIES if FAMILIES[f].configs == "pixart"):
        if (CONFIGS / "pixart" / f"transformer-{name}").exists():
            state = shapes(pixart_to_pth(full_size(f"pixart/transformer-{name}"), family))
            span = FAMILIES[family].position_span
            assert span is not None
            assert pixart_config(state, shipped_config("pixart", f"transformer-{name}"), span) == shipped(
                f"pixart/transformer-{name}"
            )
            assert math.isqrt(state["pos_embed"][1]) * 16 == FAMILIES[family].native_px


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("naming", ["ldm", "bare", "diffusers file"])
def test_thinner_unets_of_one_file_give_the_output_of_their_module(layout: str, naming: str, tmp_path: Path) -> None:
    """SSD-1B, Vega, KOALA: depths that differ from block to block, a mid block without attention, or none."""
    made = thinner(layout)
    state = made.state_dict() if naming == "diffusers file" else unet_to_ldm(made)
    prefix = "model.diffusion_model." if naming == "ldm" else ""
    save_file({prefix + key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    network = load_network(load_spec(str(tmp_path / "a.safetensors")), torch.float32, CPU)
    assert network.state_dict().keys() == made.state_dict().keys()
    with torch.inference_mode():
        torch.testing.assert_close(output(network, "sdxl", 8), output(made, "sdxl", 8), rtol=0, atol=1e-5)


@functools.cache
def thinner(layout: str) -> nn.Module:
    """A narrow UNet of a published layout."""
    from diffusers import UNet2DConditionModel

    return seeded(lambda: UNet2DConditionModel.from_config(shipped("sdxl/unet") | NARROW | LAYOUTS[layout]), 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_a_thinner_unet_is_its_config(layout: str, tmp_path: Path, checkpoint: Get) -> None:
    folder, made = tmp_path / "model", thinner(layout)
    shutil.copytree(checkpoint("sdxl", "folder").path, folder)
    shutil.rmtree(folder / "unet")
    made.save_pretrained(folder / "unet")
    save_file({key: value.contiguous() for key, value in made.state_dict().items()}, tmp_path / "a.safetensors")
    spec, file = load_spec(str(folder)), load_spec(str(tmp_path / "a.safetensors"))
    assert spec.network == file.network
    assert all(
        torch.equal(a, b) for a, b in zip(load_network(spec, torch.float32, CPU).parameters(), made.parameters(), strict=True)
    )


PUBLISHED = {"SSD-1B": 1.33, "Segmind-Vega": 0.745, "KOALA-700M": 0.78, "KOALA-1B": 1.16}  # billions of parameters


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thinner_layouts_at_full_size_have_their_published_sizes(layout: str) -> None:
    """The config that full-size shapes give builds a UNet of the same tensors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        full = UNet2DConditionModel.from_config(shipped("sdxl/unet") | LAYOUTS[layout])
        names = {key: tuple(value.shape) for key, value in unet_to_ldm(full).items()}
        again = UNet2DConditionModel.from_config(ldm_unet_config(names, shipped_config("sdxl", "unet")))
    assert {key: value.shape for key, value in again.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}
    assert sum(p.numel() for p in full.parameters()) / 1e9 == pytest.approx(PUBLISHED[layout], rel=0.03)
