"""The demo model: an SDXL-type UNet, an AutoencoderKL, two CLIP towers and their vocabulary, all small; and its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.demo.scenes import caption, kinds

NATIVE_CELLS = 32
TOKENS = 24
SIGMA_MIN, SIGMA_MAX = 0.002, 20.0
DEFAULTS = {
    "sampler": "euler_ancestral",
    "schedule": "karras",
    "steps": 24,
    "guidance": 2.0,
    "relay_sigma": 0.8,
    "relay_sampler": ["dpmpp_2m", "dpmpp_2m", "euler_ancestral"],
    "relay_steps": [6],
    "relay_guidance": 1.0,
    "tile_px": 256,
    "overlap_px": 64,
    "enlarger": ["unsharp", "unsharp", "pixel"],
    "refine": "tiles",  # neighbourhoods are softer than tiles on so small a network, and leave faint blocks
}


def make_vae() -> nn.Module:
    """The autoencoder; its norms are to be held by `pinned_norm`, so that a tile is coded as the whole picture is."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=256,
    ).to(memory_format=torch.channels_last)


def make_tokenizer(folder: Path) -> Path:
    """Write a CLIP-type BPE vocabulary whose merges come from the scenes' captions; other words fall into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = sorted({word for kind in kinds() for word in caption(kind).split()} | {"picture", "of", "the", "and", "with"})
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words * 50, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learnt["merges"]]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    entries = [*list(dict.fromkeys(entries)), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


class TextEncoders(nn.Module):
    """The two CLIP text towers of the SDXL layout, small: penultimate states side by side, pooled from the second."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        super().__init__()
        common = {"vocab_size": vocabulary, "max_position_embeddings": TOKENS, "num_hidden_layers": 2}
        common |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
        small = CLIPTextConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2, projection_dim=64, **common)
        large = CLIPTextConfig(hidden_size=128, intermediate_size=256, num_attention_heads=4, projection_dim=128, **common)
        self.one = CLIPTextModel(small)
        self.two = CLIPTextModelWithProjection(large)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        one = self.one(ids, output_hidden_states=True).hidden_states[-2]
        two = self.two(ids, output_hidden_states=True)
        return torch.cat([one, two.hidden_states[-2]], dim=-1), two.text_embeds


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=NATIVE_CELLS,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192, 128),  # 4x4 at the bottom: padding alone tells a cell where it is
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 2, 1],
        attention_head_dim=[2, 4, 6, 4],
        cross_attention_dim=192,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
        flip_sin_to_cos=True,
        freq_shift=0,
    ).to(memory_format=torch.channels_last)


def save_folder(target: Path, parts: dict[str, nn.Module], tokenizer: Path) -> float:
    """Write a diffusers-style CosXL folder in half precision; `parts` are unet, vae and both text encoders. MiB written.

    `tokenizer` is the folder the text encoders were trained with; learning its merges again could order ties differently.
    """
    for part, module in parts.items():
        shutil.rmtree(target / part, ignore_errors=True)
        module.half().save_pretrained(target / part, variant="fp16", safe_serialization=True)
        for file in (target / part).iterdir():
            file.chmod(0o644)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tokenizer, target / part, dirs_exist_ok=True)
    scheduler = {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": SIGMA_MIN,
        "sigma_max": SIGMA_MAX,
        "sigma_data": 1.0,
        "sigma_schedule": "karras",
        "prediction_type": "v_prediction",
    }
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "scheduler").mkdir(parents=True, exist_ok=True)
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    (target / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    (target / "hires.json").write_text(json.dumps({"defaults": DEFAULTS}, indent=1) + "\n")
    total = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    assert total <= 32 * 2**20, f"{total / 2**20:.1f} MiB of weights are more than the 32 MiB the package may carry"
    return total / 2**20
