"""Kinds and families of LoRAs from headers alone; add-ons of other kinds by their names; damaged files by the layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hires
from hires.checkpoints.adapters.keys import read_layers
from hires.checkpoints.adapters.loras import with_loras
from hires.checkpoints.adapters.stated import Stated, stated_beside
from hires.checkpoints.headers import read_header
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError
from hires.options.lora import LoraRef
from tests.support.checkpoints import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]
TO_K = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
PLAIN = {f"{TO_K}.lora_down.weight": (4, 128), f"{TO_K}.lora_up.weight": (64, 4)}
PROJ = "base_model.model.down_blocks.1.attentions.0.proj_in"
GLORA = {f"{TO_K}.a1.weight": (768, 4), f"{TO_K}.b1.weight": (320, 4)} | {f"{TO_K}.{leaf}2.weight": (4, 768) for leaf in "ab"}
LOKR = {f"{TO_K}.lokr_w1": (4, 32), f"{TO_K}.lokr_w2_a": (320, 2), f"{TO_K}.lokr_w2_b": (2, 64)}
KINDS: dict[str, tuple[Shapes, str, str]] = {
    "lora": ({f"{TO_K}.lora_down.weight": (4, 2048), f"{TO_K}.lora_up.weight": (1280, 4)}, "sdxl", "1 LoRA layers of rank 4"),
    "dora": (
        {f"{TO_K}.lora_down.weight": (4, 768), f"{TO_K}.lora_up.weight": (320, 4), f"{TO_K}.dora_scale": (320, 1)},
        "sd15",
        "1 LoRA layers with DoRA of rank 4",
    ),
    "loha": (
        {f"{TO_K}.hada_w{i}_{leaf}": shape for i in (1, 2) for leaf, shape in (("a", (1280, 4)), ("b", (4, 2048)))},
        "sdxl",
        "1 LoHa layers",
    ),
    "lokr": (LOKR, "sdxl", "1 LoKr layers"),
    "glora": (GLORA, "sd15", "1 GLoRA layers"),
    "diff": (
        {"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.diff": (640, 2048)},
        "sdxl",
        "1 full difference layers",
    ),
    "oft": ({"oft_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q.oft_blocks": (4, 2, 2)}, "sdxl", "1 OFT layers"),
    "boft": (
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.oft_blocks": (2, 4, 2, 2)},
        "sd15",
        "1 BOFT layers",
    ),
    "ia3": (
        {"lycoris_mid_block_attentions_0_proj_in.weight": (8,), "lycoris_mid_block_attentions_0_proj_in.on_input": ()},
        "",
        "1 (IA)³ layers",
    ),
    "norm": ({"lora_unet_out_0.w_norm": (320,), "lora_te2_text_model_final_layer_norm.b_norm": (1280,)}, "sdxl", "1 norm"),
    "peft": ({f"{PROJ}.boft_R": (1, 2, 4, 4), f"{PROJ}.boft_s": (8, 1)}, "", "1 BOFT of peft layers"),
    "text alone": ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}, "", "1 LoRA layers"),
    "flux": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, "Flux or Hunyuan Video", "1 LoRA layers"),
    "wan": ({"diffusion_model.blocks.0.cross_attn.q.lora_A.weight": (4, 1536)}, "Wan", "1 LoRA layers"),
    "z-image": ({"diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 3840)}, "Lumina 2 or Z-Image", "1 LoRA layers"),
    "qwen": ({"transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight": (4, 8)}, "Qwen-Image", "1 LoRA layers"),
    "sd3": ({"transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": (4, 8)}, "Stable Diffusion 3", "1 LoRA layers"),
    "motion": ({"down_blocks.0.motion_modules.0.temporal_transformer.x.lora_down.weight": (4, 8)}, "AnimateDiff", "1 LoRA"),
    "pixart": ({"diffusion_model.blocks.0.cross_attn.q_linear.lora_A.weight": (4, 1152)}, "pixart", "1 LoRA layers"),
}


def written(path: Path, shapes: Shapes, **metadata: str) -> Path:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path, metadata=metadata)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_kinds_and_families_by_their_headers(name: str, tmp_path: Path) -> None:
    shapes, family, why = KINDS[name]
    found = hires.inspect(written(tmp_path / "a.safetensors", shapes))
    assert (found.kind, found.family or "") == ("lora", family)
    assert why in "; ".join(found.document["why"])


OTHERS: dict[str, tuple[Shapes, str]] = {
    "ip": ({"image_proj.proj.weight": (8, 8), "ip_adapter.1.to_k_ip.weight": (8, 8)}, "is an IP-Adapter"),
    "faceid": ({"image_proj.norm.weight": (8,), "ip_adapter.0.to_q_lora.down.weight": (8, 8)}, "is an IP-Adapter"),
    "t2i": ({"body.0.block1.weight": (8, 8, 3, 3)}, "is a T2I-Adapter"),
    "t2i of diffusers": ({"adapter.body.0.resnets.0.block1.weight": (8, 8, 3, 3)}, "is a T2I-Adapter"),
    "control-lora": ({"lora_controlnet": (0,), "input_blocks.1.0.emb_layers.1.up": (8, 8)}, "is a control-LoRA"),
    "controlnet": ({"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)}, "is a ControlNet"),
    "embedding": ({"emb_params": (2, 768)}, "is a textual inversion embedding; put it in a prompt as embedding:name"),
    "of two towers": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "is a textual inversion embedding"),
    "of diffusers": ({"<cat-toy>": (768,)}, "is a textual inversion embedding"),
    "padded": (PLAIN | {f"{TO_K}.reshape_weight": (2,)}, "reshape_weight"),
    "vera": ({"base_model.model.unet.x.vera_lambda_b": (8,)}, "is a VeRA adapter"),
    "strange": (PLAIN | {f"{TO_K}.lora_strange": (8,)}, "1 keys are of no kind that can be merged, such as .*lora_strange"),
    "flux": (KINDS["flux"][0], r"is for Flux or Hunyuan Video .*, the model .* is sdxl"),
    "sd15 without a width": (KINDS["boft"][0], r"is for sd15 .*, the model .* is sdxl"),
    "no partner": ({f"{TO_K}.lora_down.weight": (4, 128)}, rf"layer {TO_K} \(LoRA\) lacks its up; the file is damaged"),
    "half a LoHa": ({f"{TO_K}.hada_w1_a": (4, 2), f"{TO_K}.hada_w1_b": (2, 128)}, r"\(LoHa\) lacks its hada_w2_a, hada_w2_b"),
    "half a LoKr": ({f"{TO_K}.lokr_w1": (2, 2), f"{TO_K}.lokr_w2_a": (4, 2)}, r"\(LoKr\) lacks its lokr_w2_b"),
    "half a core": ({f"{TO_K}.hada_{name}": (2, 128) for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1")}, "lacks its hada_t2"),
    "rank 0": (
        {f"{TO_K}.lora_down.weight": (0, 128), f"{TO_K}.lora_up.weight": (64, 0)},
        "lora_down.weight is empty, of shape",
    ),
    "two kinds": (PLAIN | {f"{TO_K}.diff": (64, 128)}, "two kinds of change, LoRA and full"),
    "stray": ({f"{TO_K}.diff": (64, 128), f"{TO_K}.dora_scale": (64, 1)}, r"dora_scale stands without the factors"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_merged_is_refused_by_its_name(name: str, tmp_path: Path, checkpoint: Callable[..., Checkpoint]) -> None:
    shapes, words = OTHERS[name]
    made = checkpoint("sdxl")
    spec = load_spec(str(made.path), parts=made.parts)
    with pytest.raises(ModelError, match=f"a.safetensors: .*{words}"):
        with_loras(spec, [LoraRef(str(written(tmp_path / "a.safetensors", shapes)))])


def test_a_hypernetwork_is_named(tmp_path: Path, demo: hires.checkpoints.model.ModelSpec) -> None:
    pair = ({"linear.0.weight": torch.ones(2, 2)}, {"linear.0.weight": torch.ones(2, 2)})
    torch.save({320: pair, "step": 3, "layer_structure": [1, 2, 1]}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="is a hypernetwork"):
        with_loras(demo, [LoraRef(str(tmp_path / "a.pt"))])


def test_two_changes_of_one_layer_that_go_together(tmp_path: Path) -> None:
    shapes = {f"{TO_K}.{name}": (4, 4) for name in ("lora_down.weight", "lora_up.weight", "alpha", "diff_b")}
    layers = read_layers(read_header(written(tmp_path / "a.safetensors", shapes)))
    assert [(layer.kind.name, sorted(layer.keys)) for layer in layers] == [
        ("lora", ["alpha", "down", "up"]),
        ("diff_b", ["diff_b"]),
    ]


def test_what_peft_states_beside_the_tensors(tmp_path: Path) -> None:
    document = {
        "unet.lora_alpha": 8,
        "unet.r": 4,
        "unet.alpha_pattern": {"attn1.to_q": 2, r"^mid_block\..*": 16},
        "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }
    path = written(tmp_path / "a.safetensors", {"x": (1,)}, lora_adapter_metadata=json.dumps(document))
    stated = stated_beside(path)
    unet = stated["network"]
    assert [unet.alpha_of(name) for name in ("down.0.attn1.to_q", "down.0.myattn1.to_q", "mid_block.x", "a.mid_block.x")] == [
        2,
        8,
        16,
        8,
    ]
    assert (stated["text_encoder"].alpha, stated["text_encoder"].rslora, unet.rslora) == (3, True, False)
    assert stated["text_encoder_2"] == Stated()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"lora_alpha": "nan"}, "alpha is nan"),
        ({"lora_alpha": True}, "alpha is True"),
        ({"lora_alpha": 1e300}, "alpha is 1e"),
        ({"r": 10**30}, "r is 1000"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "too complicated"),
        ({"alpha_pattern": {"a(": 1}}, "no regular expression"),
        ({"peft_type": "VERA"}, "peft_type VERA is not supported"),
        ({"coft": True}, "coft"),
        ([], "no JSON object"),
    ],
)
def test_statements_that_cannot_be_honoured(document: object, words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "adapter_model.safetensors", {"x": (1,)})
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=f"its configuration cannot be used .*{words}"):
        stated_beside(path)
