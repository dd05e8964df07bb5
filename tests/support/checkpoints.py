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

from hires._imports import quiet_imports
from hires.checkpoints.configs import CONFIGS, ldm_unet_names
from hires.checkpoints.families import FAMILIES
from tests.support.original_names import ldm_state, pixart_to_pth

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
    return "2k" if native_px >= 2048 else str(native_px)


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
