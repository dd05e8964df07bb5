"""Prompts to conditions through the two CLIP text towers of the SDXL layout: loaded, used, freed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from hires.conditioning import Conditioning
from hires.errors import ModelError
from hires.weights import quiet_imports

log = logging.getLogger(__name__)
TOWERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))


def encode_prompts(
    folder: Path, prompts: list[str], dtype: torch.dtype, device: torch.device, cell_px: int
) -> list[Conditioning]:
    """One Conditioning of batch 1 per prompt: penultimate states of both towers side by side, pooled from the second.

    An empty prompt is encoded like any other, never zeroed. Longer prompts are cut at the tokenizer's length. ModelError
    where a tower or its vocabulary is missing.
    """
    states: list[Tensor] = []
    pooled: Tensor | None = None
    for tower, vocabulary in TOWERS:
        tokens, model = _load(folder, tower, vocabulary, dtype, device)
        ids = tokens(
            prompts, padding="max_length", max_length=tokens.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        for prompt in prompts:
            length = len(tokens(prompt).input_ids)
            if length > tokens.model_max_length:
                log.warning("the prompt has %d tokens, %s reads the first %d", length, tower, tokens.model_max_length)
        with torch.inference_mode():
            output = model(ids.to(device), output_hidden_states=True)
        states.append(output.hidden_states[-2].float())
        pooled = getattr(output, "text_embeds", pooled)
        del model, output
    assert pooled is not None, "the second tower has a projection"
    together = torch.cat(states, dim=-1)
    return [
        Conditioning(tokens=together[i : i + 1], pooled=pooled[i : i + 1].float(), cell_px=cell_px) for i in range(len(prompts))
    ]


def _load(folder: Path, tower: str, vocabulary: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    with quiet_imports():
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    for part in (folder / tower / "config.json", folder / vocabulary / "vocab.json"):
        if not part.is_file():
            raise ModelError(f"{part}: missing; a model folder holds both text encoders and both tokenizers")
    kind = CLIPTextModelWithProjection if tower == "text_encoder_2" else CLIPTextModel
    variant = "fp16" if any((folder / tower).glob("*.fp16.safetensors")) else None
    try:
        with quiet_imports():
            tokens = CLIPTokenizer.from_pretrained(folder / vocabulary, local_files_only=True)
            model, report = kind.from_pretrained(
                folder / tower, dtype=dtype, variant=variant, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder / tower}: cannot be loaded ({error}); download the model again") from None
    wrong = [key for kind_of in ("missing_keys", "mismatched_keys") for key in report[kind_of]]
    if wrong:
        raise ModelError(f"{folder / tower}: the weights lack {len(wrong)} tensors, such as {wrong[0]}; download it again")
    return tokens, model.to(device).eval()
