"""Layers are found under every name that files have for them, each with its own strength; a used network equals a fresh one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hires.checkpoints.adapters.loras import bundled_embeddings, with_loras
from hires.checkpoints.headers import read_header
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError
from hires.models.adapters.lora import network_layers, tower_layers
from hires.models.adapters.names import unet_blocks
from hires.models.loading import load_network, remerge_network
from hires.models.text_encoders import load_clip, remerge_tower
from hires.options.lora import LoraRef
from tests.support.checkpoints import Checkpoint

Get = Callable[..., Checkpoint]
CPU = torch.device("cpu")
SDXL_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SDXL_OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
SD15_Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TOWER = "encoder.layers.1."
NETWORK_NAMES = {
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": SDXL_Q,
        "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": SDXL_Q,
        "oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": SDXL_Q,
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": SDXL_Q,
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": SDXL_Q,
        f"unet.{SDXL_Q}": SDXL_Q,
        f"base_model.model.{SDXL_Q}": SDXL_Q,
        f"unet.base_model.model.{SDXL_Q}": SDXL_Q,
        SDXL_Q: SDXL_Q,
        f"unet.{SDXL_OUT.removesuffix('.0')}": SDXL_OUT,
        "lora_unet_input_blocks_4_1_transformer_blocks_0_norm1": "down_blocks.1.attentions.0.transformer_blocks.0.norm1",
        "lora_unet_middle_block_0_in_layers_0": "mid_block.resnets.0.norm1",
        "lora_unet_input_blocks_0_0": "conv_in",
        "lora_unet_out_2": "conv_out",
        "lora_unet_label_emb_0_0": "add_embedding.linear_1",
    },
    "sd15": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": SD15_Q,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": SD15_Q.replace(
            "attn1.to_q", "ff.net.0.proj"
        ),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": SD15_Q,
    },
    "pixart-sigma-256": {
        "lora_transformer_transformer_blocks_0_attn1_to_q": "transformer_blocks.0.attn1.to_q",
        "transformer.base_model.model.transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1.to_q",
        "diffusion_model.blocks.0.cross_attn.q_linear": "transformer_blocks.0.attn2.to_q",
        "lora_unet_blocks_1_mlp_fc1": "transformer_blocks.1.ff.net.0.proj",
        "diffusion_model.final_layer.linear": "proj_out",
    },
}
TOWER_NAMES = {
    "text_encoder": {
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj": "self_attn.q_proj",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": "mlp.fc1",
        "text_encoder.text_model.encoder.layers.1.self_attn.out_proj": "self_attn.out_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.layer_norm1": "layer_norm1",
    },
    "text_encoder_2": {
        "lora_te2_text_model_encoder_layers_1_self_attn_q_proj": "self_attn.q_proj",
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc2": "mlp.fc2",
        "text_encoder_2.base_model.model.encoder.layers.1.mlp.fc2": "mlp.fc2",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.layer_norm2": "layer_norm2",
        "lora_te2_transformer_resblocks_1_mlp_c_proj": "mlp.fc2",
        "lora_te2_text_projection": "text_projection",
    },
}


def spec_of(made: Checkpoint) -> ModelSpec:
    return load_spec(str(made.path), parts=made.parts)


def written(path: Path, modules: Collection[str], tensors: dict[str, Tensor] | None = None) -> LoraRef:
    """A file that adds something to each module, weight and bias alike where `tensors` says so."""
    state = {f"{module}.diff": torch.ones(1) for module in modules} | (tensors or {})
    save_file(state, path)
    return LoraRef(str(path), 0.5, 0.25)


@pytest.mark.parametrize("family", NETWORK_NAMES)
def test_names_of_the_network(family: str, tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint(family)
    names = made.network.state_dict().keys()
    for module, wanted in NETWORK_NAMES[family].items():
        changes = network_layers([written(tmp_path / "a.safetensors", [module])], names, spec_of(made))
        assert [*changes] == [f"{wanted}.weight"] and changes[f"{wanted}.weight"][0].scale == 0.5, module


def test_a_joint_projection_of_pixart_goes_to_each_of_its_parts(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("pixart-sigma-256")
    ref = written(
        tmp_path / "a.safetensors", ["diffusion_model.blocks.1.attn.qkv", "diffusion_model.blocks.0.cross_attn.kv_linear"]
    )
    changes = network_layers([ref], made.network.state_dict().keys(), spec_of(made))
    assert {name: (each.part, each.parts) for name, (each,) in changes.items()} == {
        **{f"transformer_blocks.1.attn1.to_{leaf}.weight": (i, 3) for i, leaf in enumerate("qkv")},
        **{f"transformer_blocks.0.attn2.to_{leaf}.weight": (i, 2) for i, leaf in enumerate("kv")},
    }


@pytest.mark.parametrize("component", TOWER_NAMES)
def test_names_of_the_text_towers(component: str, tmp_path: Path, checkpoint: Get) -> None:
    tower = checkpoint("sdxl").texts[["text_encoder", "text_encoder_2"].index(component)]
    for module, wanted in TOWER_NAMES[component].items():
        changes = tower_layers([written(tmp_path / "a.safetensors", [module])], tower.state_dict().keys(), component)
        (name,) = changes
        assert name.removeprefix("text_model.") in (f"{TOWER}{wanted}.weight", f"{wanted}.weight"), module
        assert changes[name][0].scale == 0.25


def test_queries_keys_and_values_of_openclip_are_thirds_of_one(tmp_path: Path, checkpoint: Get) -> None:
    module = "lora_te2_transformer_resblocks_0_attn_in_proj"
    low = {f"{module}.lora_up.weight": torch.arange(3.0 * 64)[:, None], f"{module}.lora_down.weight": torch.ones(1, 64)}
    save_file(low | {f"{module}.diff_b": torch.arange(192.0)}, tmp_path / "a.safetensors")
    made = checkpoint("sdxl")
    ref = LoraRef(str(tmp_path / "a.safetensors"), text_scale=0.5)
    before, after = (
        made.texts[1].state_dict(),
        load_clip(spec_of(made), "text_encoder_2", torch.float32, CPU, [ref]).state_dict(),
    )
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(changed) == 6
    for part, name in enumerate("qkv"):
        (weight,), (bias,) = (
            [key for key in changed if f"0.self_attn.{name}_proj.{leaf}" in key] for leaf in ("weight", "bias")
        )
        rows = torch.arange(64.0 * part, 64.0 * part + 64)
        assert (after[weight] - before[weight] - 0.5 * rows[:, None]).abs().max() < 1e-4
        assert (after[bias] - before[bias] - 0.5 * rows).abs().max() < 1e-4


def test_block_weights_reach_their_blocks(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    names = {
        "lora_unet_input_blocks_4_1_proj_in": 4.0,
        "lora_unet_input_blocks_5_0_in_layers_2": 5.0,
        "lora_unet_middle_block_1_proj_in": 7.0,
        "lora_unet_output_blocks_5_0_in_layers_2": 8.0,
        "lora_unet_output_blocks_8_0_in_layers_2": 0.0,
        "lora_unet_input_blocks_0_0": 0.0,
        "lora_unet_time_embed_0": 1.0,
        "lora_unet_out_2": 1.0,
    }
    path = tmp_path / "a.safetensors"
    written(path, [*names, "lora_te1_text_model_encoder_layers_0_mlp_fc1"])
    ref = LoraRef(str(path), 0.5, 0.25, (3.0, 4.0, 5.0, 6.0, 6.0, 7.0, *[2.0] * 5, 8.0))
    assert (
        with_loras(spec_of(made), [ref])
        .notes[-1]
        .startswith("LoRA a.safetensors merged at 0.5:0.25:lbw=3,4,5,6,6,7,2,2,2,2,2,8: ")
    )
    changes = network_layers([ref], made.network.state_dict().keys(), spec_of(made))
    scales = {each.where.split(": ")[1].split(" ")[0]: each.scale for of_weight in changes.values() for each in of_weight}
    assert scales == {module: 0.5 * weight for module, weight in names.items()}
    (tower,) = tower_layers([ref], made.texts[0].state_dict().keys(), "text_encoder").values()
    assert tower[0].scale == 0.75
    blocks = unet_blocks(made.network.state_dict().keys(), spec_of(made))
    assert {*blocks.values()} == {*(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))}
    for family, words in (("sd15", r"takes 17 or 26"), ("pixart-sigma-256", "weighs the blocks of a UNet")):
        other = checkpoint(family)
        written(
            path, ["lora_te_text_model_encoder_layers_0_mlp_fc1" if family == "sd15" else "transformer.transformer_blocks.0.x"]
        )
        with pytest.raises(ModelError, match=words):
            with_loras(spec_of(other), [ref])


KINDS = ("lora", "dora", "lokr", "loha", "oft", "boft", "glora", "diff", "set")


def every_kind(module: nn.Module, prefix: str, seed: int) -> dict[str, Tensor]:
    """A change of each kind in turn for the square layers of a module, its norms and biases."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=draw)

    state: dict[str, Tensor] = {}
    parameters = dict(module.named_parameters())
    squares = [key for key, value in parameters.items() if value.shape == (64, 64)]
    for index, key in enumerate(squares[seed::2]):
        name, kind = prefix + key.removesuffix(".weight"), KINDS[index % len(KINDS)]
        low = {"lora_up.weight": drawn(64, 2), "lora_down.weight": drawn(2, 64), "alpha": torch.tensor(1.0)}
        state |= {
            f"{name}.{role}": value
            for role, value in {
                "lora": low,
                "dora": low | {"dora_scale": 1 + drawn(64, 1)},
                "lokr": {"lokr_w1": drawn(8, 8), "lokr_w2": drawn(8, 8)},
                "loha": {
                    f"hada_w{i}_{leaf}": drawn(*shape) for i in (1, 2) for leaf, shape in (("a", (64, 2)), ("b", (2, 64)))
                },
                "oft": {"oft_blocks": drawn(8, 8, 8)},
                "boft": {"oft_blocks": drawn(2, 16, 4, 4)},
                "glora": {
                    "a1.weight": drawn(64, 2),
                    "a2.weight": drawn(2, 64),
                    "b1.weight": drawn(64, 2),
                    "b2.weight": drawn(2, 64),
                },
                "diff": {"diff": drawn(64, 64)},
                "set": {"set_weight": drawn(64, 64)},
            }[kind].items()
        }
    for index, (key, value) in enumerate(parameters.items()):
        if value.ndim == 1 and index % 3 == seed:
            leaf = "b_norm" if key.endswith(".bias") else "w_norm"
            state[f"{prefix}{key.rpartition('.')[0]}.{leaf}"] = drawn(*value.shape)
    return state


def test_a_used_network_and_tower_equal_fresh_ones_bit_for_bit(tmp_path: Path, checkpoint: Get) -> None:
    """With changes of every kind, biases and norms too, to others, to other strengths, and to none."""
    made = checkpoint("sd15")
    spec, sets = spec_of(made), []
    for seed in range(2):
        path = tmp_path / f"{seed}.safetensors"
        texts = {
            key.replace("text_model.text_model.", "text_model."): value
            for key, value in every_kind(made.texts[0], "text_encoder.text_model.", seed).items()
        }
        save_file(every_kind(made.network, "unet.", seed) | texts, path)
        sets.append(LoraRef(str(path), 0.7, 0.4))
    ways = [(sets[0],), (sets[1], sets[0]), (LoraRef(sets[1].path, 0.7, 0.4, (0.5,) * 26),), ()]
    network, tower = load_network(spec, torch.float32, CPU), load_clip(spec, "text_encoder", torch.float32, CPU)
    plain = {key: value.clone() for key, value in network.state_dict().items()}
    for before, loras in zip(((), *ways), ways, strict=False):
        remerge_network(network, spec, before, loras)
        remerge_tower(tower, spec.parts["text_encoder"], before, loras)
        fresh = load_network(spec, torch.float32, CPU, loras).state_dict()
        assert all(torch.equal(value, fresh[key]) for key, value in network.state_dict().items()), loras
        clip = load_clip(spec, "text_encoder", torch.float32, CPU, loras).state_dict()
        assert all(torch.equal(value, clip[key]) for key, value in tower.state_dict().items()), loras
        changed = [key for key, value in fresh.items() if not torch.equal(value, plain[key])]
        assert bool(changed) == bool(loras)
        assert not loras or {key.rpartition(".")[2] for key in changed} == {"weight", "bias"}


def test_a_change_of_four_channels_on_a_network_that_takes_eight(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("cosxl-edit")
    low = {
        "lora_unet_input_blocks_0_0.lora_up.weight": torch.ones(32, 1, 1, 1),
        "lora_unet_input_blocks_0_0.lora_down.weight": torch.ones(1, 4, 3, 3),
    }
    save_file(low, tmp_path / "a.safetensors")
    after = load_network(spec_of(made), torch.float32, CPU, [LoraRef(str(tmp_path / "a.safetensors"), 2.0)]).state_dict()[
        "conv_in.weight"
    ]
    added = after - made.network.state_dict()["conv_in.weight"]
    assert (added[:, :4] - 2).abs().max() < 1e-5 and not added[:, 4:].any()


def test_embeddings_of_a_file_and_layers_without_a_place_are_told(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    q = f"unet.{SDXL_Q}"
    brought = {
        "bundle_emb.my.style.string_to_param.*": torch.ones(2, 64),
        "bundle_emb.other.clip_l": torch.ones(2, 64),
        "bundle_emb.other.clip_g": torch.ones(2, 64),
        "text_encoders.clip_l.transformer.text_projection.diff": torch.ones(64, 64),
    }
    ref = written(tmp_path / "a.safetensors", [q], brought)
    assert bundled_embeddings(read_header(Path(ref.path))) == ("my.style", "other")
    notes = with_loras(spec_of(made), [ref]).notes
    assert any("brings the embeddings my.style, other" in note for note in notes)
    assert any("the projection of CLIP-L is left out" in note for note in notes)
    assert not tower_layers([ref], made.texts[0].state_dict().keys(), "text_encoder")


def test_a_bias_that_the_layer_has_not_fits_nothing(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    save_file({f"unet.{SDXL_Q}.diff_b": torch.ones(64)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="1 of its layers fit nothing"):
        network_layers([LoraRef(str(tmp_path / "a.safetensors"))], made.network.state_dict().keys(), spec_of(made))
    with pytest.raises(RequestError, match="give a path and a number"):
        LoraRef("a", 1.0, "b")  # type: ignore[arg-type]
