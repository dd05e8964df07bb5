"""Tiny random checkpoints in the layouts that real ones have, written at test time.

`make(folder, family, layout)` writes one of any family as a single file ('file': SDXL's or SD1.5's safetensors, PixArt's
original .pth) or as a diffusers folder ('folder') and returns where it is with the modules it was made from. What a single
file lacks (tokenizers, PixArt's T5 and VAE) is in `parts`. `lora` writes a LoRA for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hires.families import FAMILIES
from hires.layouts import CONFIGS, ldm_unet_names
from hires.weights import quiet_imports

with quiet_imports():
    from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

WIDTH = 64  # of either CLIP tower; T5 has half
CLIP_WORDS = 514


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """path: what `--model` takes. parts: what `--parts` takes, None for a folder that has all. texts: the text towers."""

    path: Path
    parts: Path | None
    family: str
    network: nn.Module
    vae: nn.Module
    texts: tuple[nn.Module, ...]
    kv: dict[int, dict[str, Tensor]]


def make(
    folder: Path,
    family: str,
    layout: str = "file",
    *,
    sigmas: tuple[float, float] = (0.002, 120.0),
    dtype: torch.dtype = torch.float32,
    kv: Mapping[int, int] | None = None,
    wrapper: str | None = "state_dict",
    name: str | None = None,
) -> Checkpoint:
    """Write a checkpoint of `family` into `folder`.

    sigmas: least and largest, into CosXL's two tensors. kv: PixArt only, {block: factor} of KV compression. wrapper: the key
    that a .pth holds its tensors under, None for the tensors alone. name: of the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = FAMILIES[family]
    network = pixart(family) if facts.network == "pixart" else unet(family)
    vae, texts = autoencoder(), text_towers(family)
    made = Checkpoint(path=folder, parts=None, family=family, network=network, vae=vae, texts=texts, kv={})
    if layout == "folder":
        write_folder(made, dtype, sigmas)
        return made
    parts = folder / "parts"
    if facts.network == "pixart":
        path, extra = folder / (name or f"{family}.pth"), kv_tensors(network, kv or {})
        state = pixart_to_pth(network, family) | {
            f"blocks.{block}.attn.{key}": value for block, tensors in extra.items() for key, value in tensors.items()
        }
        state = {key: value.to(dtype) for key, value in state.items()}
        torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, path)
        save_texts(parts, texts)
        t5_tokenizer(parts / "tokenizer", facts.tokens)
        save_vae(parts / "vae", vae, facts.latent_scale)
        return Checkpoint(path=path, parts=parts, family=family, network=network, vae=vae, texts=texts, kv=extra)
    path = folder / (name or f"{family}.safetensors")
    state = ldm_state(network, vae, texts) | marks(family, sigmas)
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, path)
    save_tokenizers(parts, len(texts))
    return Checkpoint(path=path, parts=parts, family=family, network=network, vae=vae, texts=texts, kv={})


def marks(family: str, sigmas: tuple[float, float]) -> dict[str, Tensor]:
    """The tensors that only say what kind of SDXL a file is."""
    if FAMILIES[family].parameterisation == "edm_v":
        return {"edm_vpred.sigma_min": torch.tensor(sigmas[0]), "edm_vpred.sigma_max": torch.tensor(sigmas[1])}
    if FAMILIES[family].parameterisation == "v":
        return {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    return {}


# --- modules -----------------------------------------------------------------------------------------------------------


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module whose every parameter is random, norms and biases too, so that no two can be swapped unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


def shipped(path: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / path / "config.json").read_text())
    return config


def unet(family: str, channels: int | None = None) -> nn.Module:
    """A tiny UNet of SDXL's or SD1.5's structure; `channels` overrides how many go in."""
    facts = FAMILIES[family]
    config = shipped(f"{facts.configs}/unet") | {"in_channels": channels or facts.latent_channels + facts.image_channels}
    if facts.configs == "sdxl":
        config |= {
            "block_out_channels": [32, 64, 64], "attention_head_dim": [1, 1, 1], "transformer_layers_per_block": [1, 1, 2],
            "cross_attention_dim": 2 * WIDTH, "projection_class_embeddings_input_dim": WIDTH + 6 * 256, "sample_size": 32,
        }  # fmt: skip
    else:
        config |= {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": WIDTH, "sample_size": 16}
    return seeded(lambda: UNet2DConditionModel.from_config(config), 1)


def autoencoder() -> nn.Module:
    """A tiny AutoencoderKL with four levels: 8 px per cell, 4 channels."""
    config = shipped("sdxl/vae") | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "sample_size": 64}
    return seeded(lambda: AutoencoderKL.from_config(config), 2)


def pixart(family: str) -> nn.Module:
    """A tiny PixArt transformer: two blocks of 2 x 72 channels, trained grid and conditions as the family's."""
    facts = FAMILIES[family]
    base = f"pixart/transformer-{'sigma' if facts.tokens == 300 else 'alpha'}-{size_name(facts.native_px)}"
    config = shipped(base) | {
        "num_layers": 2, "num_attention_heads": 2, "cross_attention_dim": 144, "caption_channels": WIDTH // 2,
        "use_additional_conditions": facts.size_conditions == "pixart",
    }  # fmt: skip
    return seeded(lambda: PixArtTransformer2DModel.from_config(config), 3)


def size_name(native_px: int) -> str:
    return "2k" if native_px == 2048 else str(native_px)


def text_towers(family: str) -> tuple[nn.Module, ...]:
    """The tiny text towers: CLIP-L (and OpenCLIP-G), or a T5 encoder."""
    facts = FAMILIES[family]
    if facts.text == ("t5",):
        config = T5Config(
            vocab_size=64, d_model=WIDTH // 2, d_kv=8, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False, tie_word_embeddings=False,
        )  # fmt: skip
        return (seeded(lambda: T5EncoderModel(config), 4),)
    tiny = {
        "hidden_size": WIDTH, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 128,
        "projection_dim": WIDTH, "vocab_size": CLIP_WORDS,
    }  # fmt: skip
    first = CLIPTextConfig(**shipped("sdxl/text_encoder") | tiny)
    second = CLIPTextConfig(**shipped("sdxl/text_encoder_2") | tiny)
    towers = (seeded(lambda: CLIPTextModel(first), 5), seeded(lambda: CLIPTextModelWithProjection(second), 6))
    return towers[: len(facts.text)]


def kv_tensors(network: nn.Module, factors: Mapping[int, int]) -> dict[int, dict[str, Tensor]]:
    """Upstream's strided depthwise convolution and norm per compressed block."""
    width = network.config.cross_attention_dim
    draw = torch.Generator().manual_seed(7)

    def tensors(factor: int) -> dict[str, Tensor]:
        shapes = {"sr.weight": (width, 1, factor, factor), "sr.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
        return {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}

    return {block: tensors(factor) for block, factor in factors.items()}


# --- from our names to those of the original files ---------------------------------------------------------------------


def ldm_state(network: nn.Module, vae: nn.Module, texts: tuple[nn.Module, ...]) -> dict[str, Tensor]:
    """The single-file state of SDXL (two towers) or SD1.5 (one), with the leftovers that real files carry."""
    sdxl = len(texts) == 2
    state = {f"model.diffusion_model.{key}": value for key, value in unet_to_ldm(network).items()}
    state |= {f"first_stage_model.{key}": value for key, value in vae_to_ldm(vae).items()}
    first = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
    state |= {first + key: value for key, value in clip_to_ldm(texts[0]).items()}
    state[first + "text_model.embeddings.position_ids"] = torch.arange(77)[None].float()
    if sdxl:
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in clip_to_openclip(texts[1]).items()}
    else:
        state["alphas_cumprod"] = torch.rand(1000)
    return state


def unet_to_ldm(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    modules = {key.rpartition(".")[0] for key in state}
    names = ldm_unet_names(modules, network.config.layers_per_block)
    return {f"{names[module]}.{leaf}": state[f"{module}.{leaf}"] for module, _, leaf in (k.rpartition(".") for k in state)}


def vae_to_ldm(vae: nn.Module) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)

    def renamed(key: str) -> str:
        for i in range(levels):
            key = key.replace(f"down_blocks.{i}.resnets.", f"down.{i}.block.")
            key = key.replace(f"down_blocks.{i}.downsamplers.0", f"down.{i}.downsample")
            key = key.replace(f"up_blocks.{i}.resnets.", f"up.{levels - 1 - i}.block.")
            key = key.replace(f"up_blocks.{i}.upsamplers.0", f"up.{levels - 1 - i}.upsample")
        for mine, theirs in (
            ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
            ("mid_block.attentions.0", "mid.attn_1"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"),
        ):  # fmt: skip
            key = key.replace(mine, theirs)
        return key

    state = {renamed(key): value for key, value in vae.state_dict().items()}
    return {k: v[..., None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in state.items()}


def clip_to_ldm(tower: nn.Module) -> dict[str, Tensor]:
    """Names as transformers had them when the files were made: everything under text_model."""
    return {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tower.state_dict().items()}


def clip_to_openclip(tower: nn.Module) -> dict[str, Tensor]:
    state = {key.removeprefix("text_model."): value for key, value in tower.state_dict().items()}
    result = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "text_projection": state.pop("text_projection.weight").T,
        "logit_scale": torch.tensor(4.6),
    }
    for leaf in ("weight", "bias"):
        result[f"ln_final.{leaf}"] = state.pop(f"final_layer_norm.{leaf}")
        for i in range(tower.config.num_hidden_layers):
            mine, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            heads = [state.pop(f"{mine}.self_attn.{name}_proj.{leaf}") for name in "qkv"]
            result[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(heads)
            for ours, other in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                result[f"{theirs}.{other}.{leaf}"] = state.pop(f"{mine}.{ours}.{leaf}")
    assert not state, sorted(state)
    return result


def pixart_to_pth(network: nn.Module, family: str) -> dict[str, Tensor]:
    """The original naming of PixArt, with the two tensors that are no weights of the network."""
    state = dict(network.state_dict())
    width, caption = network.config.cross_attention_dim, network.config.caption_channels
    grid = network.config.sample_size // network.config.patch_size
    result = {
        "pos_embed": torch.zeros(1, grid**2, width),
        "y_embedder.y_embedding": torch.zeros(FAMILIES[family].tokens, caption),
        "final_layer.scale_shift_table": state.pop("scale_shift_table"),
    }
    pairs = {
        "pos_embed.proj": "x_embedder.proj", "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2", "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    }  # fmt: skip
    for ours, other in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar")):
        for ours_leaf, other_leaf in (("linear_1", "0"), ("linear_2", "2")):
            pairs[f"adaln_single.emb.{ours}_embedder.{ours_leaf}"] = f"{other}_embedder.mlp.{other_leaf}"
    for i in range(network.config.num_layers):
        result[f"blocks.{i}.scale_shift_table"] = state.pop(f"transformer_blocks.{i}.scale_shift_table")
        for ours, other in (
            ("attn1.to_out.0", "attn.proj"), ("attn2.to_q", "cross_attn.q_linear"), ("attn2.to_out.0", "cross_attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2"),
        ):  # fmt: skip
            pairs[f"transformer_blocks.{i}.{ours}"] = f"blocks.{i}.{other}"
        for leaf in ("weight", "bias"):
            block = f"transformer_blocks.{i}"
            result[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([state.pop(f"{block}.attn1.to_{n}.{leaf}") for n in "qkv"])
            both = torch.cat([state.pop(f"{block}.attn2.to_{n}.{leaf}") for n in "kv"])
            result[f"blocks.{i}.cross_attn.kv_linear.{leaf}"] = both
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        result[f"{pairs[module]}.{leaf}"] = value
    return result


# --- folders -----------------------------------------------------------------------------------------------------------


def write_folder(made: Checkpoint, dtype: torch.dtype, sigmas: tuple[float, float]) -> None:
    """A whole diffusers folder."""
    facts, folder = FAMILIES[made.family], made.path
    pixart_kind = facts.network == "pixart"
    place = folder / ("transformer" if pixart_kind else "unet")
    made.network.save_pretrained(place)
    if dtype != torch.float32:
        weights = place / "diffusion_pytorch_model.safetensors"
        save_file({key: value.to(dtype) for key, value in made.network.state_dict().items()}, weights)
    save_vae(folder / "vae", made.vae, facts.latent_scale)
    save_texts(folder, made.texts)
    if pixart_kind:
        t5_tokenizer(folder / "tokenizer", facts.tokens)
    else:
        save_tokenizers(folder, len(made.texts))
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler(made.family, sigmas))
    write_json(folder / "model_index.json", {"_class_name": pipeline_name(made.family)})


def scheduler(family: str, sigmas: tuple[float, float]) -> dict[str, Any]:
    """The scheduler that the family's folder is published with."""
    facts = FAMILIES[family]
    if facts.parameterisation == "edm_v":
        return {
            "_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_data": 1.0,
            "sigma_min": sigmas[0], "sigma_max": sigmas[1],
        }  # fmt: skip
    assert facts.betas is not None
    names = {"lcm": "LCMScheduler", "turbo": "EulerAncestralDiscreteScheduler", "dmd": "DDPMScheduler"}
    config: dict[str, Any] = {
        "_class_name": names.get(facts.few_step or "", "EulerDiscreteScheduler"), "beta_schedule": facts.betas[0],
        "beta_start": facts.betas[1], "beta_end": facts.betas[2],
        "prediction_type": "v_prediction" if facts.parameterisation == "v" else "epsilon",
        "rescale_betas_zero_snr": facts.parameterisation == "v",
    }  # fmt: skip
    return config | ({"timestep_spacing": "trailing"} if facts.few_step == "turbo" else {})


def pipeline_name(family: str) -> str:
    facts = FAMILIES[family]
    if facts.network == "pixart":
        return "PixArtSigmaPipeline" if facts.tokens == 300 else "PixArtAlphaPipeline"
    if facts.configs == "sd15":
        return "StableDiffusionPipeline"
    return "StableDiffusionXLInstructPix2PixPipeline" if facts.image_channels else "StableDiffusionXLPipeline"


def save_vae(folder: Path, vae: nn.Module, scale: float) -> None:
    vae.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"scaling_factor": scale})


def save_texts(folder: Path, texts: tuple[nn.Module, ...]) -> None:
    for name, tower in zip(("text_encoder", "text_encoder_2"), texts, strict=False):
        tower.save_pretrained(folder / name)


def save_tokenizers(folder: Path, towers: int) -> None:
    for name in ("tokenizer", "tokenizer_2")[:towers]:
        clip_tokenizer(folder / name)


def clip_tokenizer(folder: Path) -> None:
    """A CLIP vocabulary of single bytes, no merges, 77 tokens: 256 bytes, 256 at the end of a word, two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    assert len(words) == CLIP_WORDS
    write_json(folder / "vocab.json", {word: index for index, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        },
    )  # fmt: skip


def t5_tokenizer(folder: Path, tokens: int) -> None:
    """A T5 vocabulary of single letters with T5's three marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in letters)]
    built = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": tokens}
    marks_of = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config | marks_of)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


# --- LoRAs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TinyLora:
    """path, and what it adds to each weight at scale 1: {component: {weight name: delta}}."""

    path: Path
    deltas: dict[str, dict[str, Tensor]]


def lora(
    path: Path,
    made: Checkpoint,
    style: str = "kohya",
    *,
    rank: int = 3,
    alpha: float | None = 6.0,
    texts: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> TinyLora:
    """Write a LoRA of every linear and convolution of the network, and of the CLIP towers' layers with `texts`.

    style: 'kohya' (SDXL in latent diffusion's names, else diffusers', flattened, with alpha), 'kohya-diffusers' (always
    diffusers' names, flattened), 'peft', 'diffusers' (lora.down, lora.up) or 'processor' (diffusers' oldest).
    """
    draw = torch.Generator().manual_seed(11)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, dict[str, Tensor]] = {}
    sdxl_names = style == "kohya" and len(made.texts) == 2
    names = ldm_unet_names(unet_modules(made.network), made.network.config.layers_per_block) if sdxl_names else {}
    towers = zip(("text_encoder", "text_encoder_2"), made.texts if texts else (), strict=False)
    for component, module in (("network", made.network), *towers):
        deltas[component] = {}
        for name, weight in module.state_dict().items():
            bare = name.removesuffix(".weight")
            if not _takes_lora(component, name, weight):
                continue
            down = torch.randn((rank, *weight.shape[1:]), generator=draw) * 0.2
            up = torch.randn((weight.shape[0], rank, *[1] * (weight.ndim - 2)), generator=draw) * 0.2
            factor = 1.0 if alpha is None else alpha / rank
            product = torch.tensordot(up.flatten(1), down, dims=1)
            deltas[component][name] = factor * product
            key, ends = _lora_key(made, component, names.get(bare, bare) if component == "network" else bare, style)
            tensors |= {f"{key}{ends[0]}": down, f"{key}{ends[1]}": up}
            if alpha is not None:
                tensors[f"{key.removesuffix('_lora')}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=dict(metadata or {}))
    return TinyLora(path=path, deltas=deltas)


def _takes_lora(component: str, name: str, weight: Tensor) -> bool:
    layers = component == "network" or "encoder.layers." in name
    return layers and name.endswith(".weight") and weight.ndim in (2, 4)


def _lora_key(made: Checkpoint, component: str, name: str, style: str) -> tuple[str, tuple[str, str]]:
    pixart_kind = isinstance(made.network, PixArtTransformer2DModel)
    if component != "network":
        name = f"text_model.{name.removeprefix('text_model.')}"
    if style.startswith("kohya"):
        start = {"network": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
        if len(made.texts) == 1 and component == "text_encoder":
            start = "lora_te_"
        return start + name.replace(".", "_"), (".lora_down.weight", ".lora_up.weight")
    start = ("transformer." if pixart_kind else "unet.") if component == "network" else f"{component}."
    if style == "peft":
        return start + name, (".lora_A.weight", ".lora_B.weight")
    if style == "processor" and (".attn1." in name or ".attn2." in name):
        block, _, leaf = name.removesuffix(".0").rpartition(".")
        return f"{start}{block}.processor.{leaf}_lora", (".down.weight", ".up.weight")
    return start + name, (".lora.down.weight", ".lora.up.weight")


def unet_modules(network: nn.Module) -> list[str]:
    return sorted({key.rpartition(".")[0] for key in network.state_dict()})
