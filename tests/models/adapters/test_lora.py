"""LoRA: merged weights are W + scale alpha/r B A, in every key style; another model's is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hires.checkpoints.adapters.loras import with_loras
from hires.checkpoints.configs import ldm_unet_names
from hires.checkpoints.detect_file import identify_lora
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.few_step.profiles import PROFILES
from hires.checkpoints.headers import read_header
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError, RequestError
from hires.models.adapters.change import Change
from hires.models.adapters.lora import merged
from hires.models.loading import load_network
from hires.models.text_encoders import encode_prompts, load_clip
from hires.options.lora import LoraRef, parse_lora
from hires.options.render import RenderRequest
from hires.tiling.geometry import Size
from tests.models.test_loading import output
from tests.support.checkpoints import Checkpoint, lora, unet_modules

Get = Callable[..., Checkpoint]
CPU = torch.device("cpu")
STYLES = [
    ("sdxl", "file", "kohya"), ("sdxl", "folder", "kohya"), ("sdxl", "file", "kohya-diffusers"), ("cosxl", "file", "peft"),
    ("sdxl", "file", "diffusers"), ("sdxl", "file", "processor"), ("sd15", "file", "kohya"), ("sd15", "folder", "peft"),
    ("pixart-sigma-256", "file", "peft"), ("pixart-alpha-1024", "folder", "peft"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "layout", "style"), STYLES)
def test_merged_weights_are_w_plus_scaled_ba(family: str, layout: str, style: str, tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint(family, layout)
    clip = FAMILIES[family].text != ("t5",)
    alpha = 6.0 if style.startswith("kohya") else None
    tiny = lora(tmp_path / "style.safetensors", made, style, alpha=alpha, texts=clip)
    refs = [LoraRef(str(tiny.path), 0.7)]
    spec = with_loras(load_spec(str(made.path), parts=made.parts), refs)
    loaded = {"network": load_network(spec, torch.float32, CPU, refs)}
    if clip:
        names = ("text_encoder", "text_encoder_2")[: len(made.texts)]
        loaded |= {name: load_clip(spec, name, torch.float32, CPU, refs) for name in names}
    assert loaded.keys() == tiny.deltas.keys()
    for (component, module), source in zip(loaded.items(), (made.network, *made.texts), strict=False):
        before, deltas = source.state_dict(), tiny.deltas[component]
        assert len(deltas) > 10
        for key, value in module.state_dict().items():
            wanted = before[key] + 0.7 * deltas[key] if key in deltas else before[key]
            assert (value - wanted).abs().max() <= 1e-6, (component, key)
            assert key not in deltas or (value - before[key]).abs().max() > 1e-3


def test_the_forward_is_that_of_the_merged_weights(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    tiny = lora(tmp_path / "a.safetensors", made, "kohya", texts=False)
    refs = [LoraRef(str(tiny.path), 0.3)]
    spec = with_loras(load_spec(str(made.path), parts=made.parts), refs)
    with torch.inference_mode():
        got = output(load_network(spec, torch.float32, CPU, refs), "sdxl")
        network = load_network(spec, torch.float32, CPU)
        plain = output(network, "sdxl")
        state = {key: value + 0.3 * tiny.deltas["network"].get(key, 0) for key, value in network.state_dict().items()}
        network.load_state_dict(state)
        assert (output(network, "sdxl") - got).abs().max() <= 1e-5 * got.abs().max()
    assert (got - plain).abs().max() > 1e-2


def test_the_forward_is_that_of_peft(tmp_path: Path, checkpoint: Get) -> None:
    """As diffusers' own adapters, which run beside the weights."""
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel

    made = checkpoint("sdxl")
    spec = load_spec(str(made.path), parts=made.parts)
    peft = lora(tmp_path / "b.safetensors", made, "peft", alpha=None, texts=False)
    reference = UNet2DConditionModel.from_config(made.network.config)
    reference.load_state_dict(made.network.state_dict())
    reference.load_lora_adapter(load_file(peft.path), prefix="unet", adapter_name="a")
    reference.set_adapters("a", 0.3)
    refs = [LoraRef(str(peft.path), 0.3)]
    with torch.inference_mode():
        ours = output(load_network(spec, torch.float32, CPU, refs), "sdxl")
        assert (output(reference, "sdxl") - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_published_key_names_find_their_layers() -> None:
    """Names as they stand in published LoRAs of SDXL (latent diffusion's, flattened), written out by hand."""
    from tests.models.test_loading import full_size

    names = ldm_unet_names(unet_modules(full_size("sdxl/unet")), 2)
    flat = {other.replace(".", "_"): name for name, other in names.items()}
    assert len(flat) == len(names)
    for key, name in {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_8_1_proj_in": "down_blocks.2.attentions.1.proj_in",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj": "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_0_1_transformer_blocks_3_attn2_to_out_0": "up_blocks.0.attentions.0.transformer_blocks.3.attn2.to_out.0",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "output_blocks_5_0_emb_layers_1": "up_blocks.1.resnets.2.time_emb_proj",
        "label_emb_0_0": "add_embedding.linear_1",
        "time_embed_2": "time_embedding.linear_2",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
    }.items():
        assert flat[key] == name


def test_several_loras_add_up_and_merge_before_the_cast(tmp_path: Path, checkpoint: Get) -> None:
    weight = torch.full((2, 3), 1.0, dtype=torch.float16)
    factors = {"up": torch.ones(2, 1), "down": torch.ones(1, 3), "alpha": torch.tensor(2**-12)}
    tiny = Change(where="x", kind="lora", tensors=factors, scale=1.0)
    assert torch.equal(merged(weight, [tiny] * 4).half(), weight + 2**-10)  # lost, were each added in half precision
    made = checkpoint("sd15")
    a, b = (lora(tmp_path / f"{name}.safetensors", made, "kohya", texts=False) for name in "ab")
    refs = [LoraRef(str(a.path), 1.0), LoraRef(str(b.path), -1.0)]
    spec = with_loras(load_spec(str(made.path), parts=made.parts), refs)
    assert [note.split(" merged")[0] for note in spec.notes] == ["LoRA a.safetensors", "LoRA b.safetensors"]
    state = load_network(spec, torch.float32, CPU, refs).state_dict()
    assert all((state[key] - value).abs().max() < 1e-6 for key, value in made.network.state_dict().items())


def test_alpha_that_is_stated_beside_the_tensors_counts(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("pixart-sigma-256")
    folder = tmp_path / "peft"
    tiny = lora(folder / "adapter_model.safetensors", made, "peft", rank=4, alpha=None, texts=False)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    spec = load_spec(str(made.path), parts=made.parts)
    described = lora(
        tmp_path / "b.safetensors", made, "peft", rank=4, alpha=None, texts=False,
        metadata={"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})},
    )  # fmt: skip
    for ref in (LoraRef(str(folder)), LoraRef(str(described.path))):
        state = load_network(with_loras(spec, [ref]), torch.float32, CPU, [ref]).state_dict()
        for key, delta in tiny.deltas["network"].items():
            assert (state[key] - made.network.state_dict()[key] - 4 * delta).abs().max() < 1e-5
    patterns = {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "alpha_pattern": {r"attn1\.to_q": 2, "transformer_blocks.0.attn1.to_k": 3},
    }
    (folder / "adapter_config.json").write_text(json.dumps(patterns))
    ref = LoraRef(str(folder))
    state, before = load_network(with_loras(spec, [ref]), torch.float32, CPU, [ref]).state_dict(), made.network.state_dict()
    for key, delta in tiny.deltas["network"].items():
        alpha = 2 if "attn1.to_q" in key else 3 if "blocks.0.attn1.to_k" in key else 16
        assert (state[key] - before[key] - alpha / 4**0.5 * delta).abs().max() < 1e-5, key


def test_a_lora_of_another_family_is_refused_with_both_named(tmp_path: Path, checkpoint: Get) -> None:
    made = {family: checkpoint(family) for family in ("sdxl", "sd15", "pixart-sigma-256", "cosxl")}
    files = {
        family: lora(tmp_path / f"{family}.safetensors", made[family], "peft", texts=False)
        for family in ("sdxl", "sd15", "pixart-sigma-256")
    }
    for source, target in (("sdxl", "sd15"), ("sd15", "sdxl"), ("sdxl", "pixart-sigma-256"), ("pixart-sigma-256", "cosxl")):
        spec = load_spec(str(made[target].path), parts=made[target].parts)
        words = {"sdxl": "width of 128", "sd15": "width of 64", "pixart-sigma-256": "pixart"}[source]
        with pytest.raises(ModelError, match=rf"is for .*{words}.* is {target}"):
            with_loras(spec, [LoraRef(str(files[source].path))])


def test_layers_of_a_text_tower_that_takes_none_are_refused(tmp_path: Path, checkpoint: Get) -> None:
    """None may be left out unseen: T5 takes no LoRA, SD1.5 has no second tower."""
    extra = {f"text_encoder{second}.encoder.x.lora_{end}.weight": torch.ones(2, 2) for second in ("", "_2") for end in "AB"}
    for family, count in (("pixart-sigma-256", 4), ("sd15", 2)):
        made = checkpoint(family)
        state = load_file(lora(tmp_path / "a.safetensors", made, "peft", texts=False).path)
        save_file(state | extra, tmp_path / "b.safetensors")
        with pytest.raises(ModelError, match=f"{count} of its keys are for a text tower that takes none here"):
            with_loras(load_spec(str(made.path), parts=made.parts), [LoraRef(str(tmp_path / "b.safetensors"))])


@pytest.mark.parametrize(
    ("width", "family"), [(2048, "sdxl"), (768, "sd15"), (1024, "Stable Diffusion 2"), (72, "text width of 72")]
)
def test_full_size_loras_are_named_by_the_text_they_read(width: int, family: str, tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": torch.ones(4, width)}, tmp_path / "a.safetensors")
    found = identify_lora(read_header(tmp_path / "a.safetensors"))
    assert found is not None
    assert family in found.family


def test_an_lcm_lora_brings_its_defaults_and_is_refused_where_it_was_not_distilled(tmp_path: Path, checkpoint: Get) -> None:
    sdxl, cosxl = checkpoint("sdxl"), checkpoint("cosxl")
    named = lora(tmp_path / "lcm-lora-sdxl" / "pytorch_lora_weights.safetensors", sdxl, "kohya", texts=False)
    told = lora(tmp_path / "x.safetensors", sdxl, "kohya", texts=False, metadata={"ss_output_name": "my_LCM"})
    plain = lora(tmp_path / "y.safetensors", sdxl, "kohya", texts=False)
    base = load_spec(str(sdxl.path), parts=sdxl.parts)
    assert with_loras(base, [LoraRef(str(plain.path))]).family == "sdxl"
    hub = tmp_path / "hub" / "models--latent-consistency--lcm-lora-sdxl" / "snapshots" / "a1b2c3"
    cached = lora(hub / "pytorch_lora_weights.safetensors", sdxl, "kohya", texts=False)
    for path in (named.path, named.path.parent, told.path, cached.path):
        spec = with_loras(base, [LoraRef(str(path))])
        assert spec.profile is PROFILES["lcm"]
        assert (spec.defaults, spec.facts.few_step) == (FAMILIES["sdxl-lcm"].defaults, "lcm")
        assert any("profile lcm, of LoRA" in note for note in spec.notes)
        assert with_loras(base, [LoraRef(str(path))], profile="none").defaults == base.defaults
    asked = load_spec(str(sdxl.path), family="sdxl-lcm", parts=sdxl.parts)
    assert with_loras(asked, [LoraRef(str(plain.path))]).family == "sdxl-lcm"
    for refused in (named, cached):
        with pytest.raises(ModelError, match=r"LCM.*runs on sdxl or sd15 with epsilon.*is cosxl \(edm_v\): give such"):
            with_loras(load_spec(str(cosxl.path), parts=cosxl.parts), [LoraRef(str(refused.path))])
        merged = with_loras(load_spec(str(cosxl.path), parts=cosxl.parts), [LoraRef(str(refused.path))], profile="none")
        assert merged.profile is None
    other = lora(tmp_path / "calcmatic-style.safetensors", sdxl, "kohya", texts=False)
    assert with_loras(base, [LoraRef(str(other.path))]).profile is None
    assert with_loras(base, [LoraRef(str(named.path), 0.0)]).profile is None, "merged at 0 it changes nothing"


def test_keys_that_fit_nothing_are_counted_and_named(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    spec = load_spec(str(made.path), parts=made.parts)
    state: dict[str, Tensor] = load_file(lora(tmp_path / "a.safetensors", made, "kohya").path)

    def load_all(refs: list[LoraRef]) -> None:
        encode_prompts(spec, [""], torch.float32, CPU, refs)
        load_network(spec, torch.float32, CPU, refs)

    def refused(changed: dict[str, Tensor], words: str) -> None:
        save_file(changed, tmp_path / "b.safetensors")
        refs = [LoraRef(str(tmp_path / "b.safetensors"))]
        with pytest.raises(ModelError, match=words):
            load_all(refs)

    ends = ("lora_down.weight", "lora_up.weight")
    strange = {f"lora_unet_nowhere_{i}.{end}": torch.ones(2, 2) for i in range(2) for end in ends}
    refused(state | strange, r"2 of its layers fit nothing in the model, such as lora_unet_nowhere_0")
    refused(
        state | {f"lora_te1_nowhere.{key}": torch.ones(2, 2) for key in ends}, "1 of its layers fit nothing.*lora_te1_nowhere"
    )
    refused(state | {"lora_unet_out_2.lora_strange": torch.ones(2)}, "1 keys are of no kind that can be merged.*lora_strange")
    refused(state | {"lora_unet_out_2.lora_down.weight": torch.ones(3, 5, 3, 3)}, r"lora_unet_out_2.*do not fit a weight of")
    lone = {key: value for key, value in state.items() if key != "lora_unet_out_2.lora_up.weight"}
    refused(lone, r"layer lora_unet_out_2 \(LoRA\) lacks its up")


def test_files_that_are_no_lora_say_so(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    spec = load_spec(str(made.path), parts=made.parts)
    with pytest.raises(ModelError, match="a whole checkpoint; give it with `model`"):
        with_loras(spec, [LoraRef(str(made.path))])
    with pytest.raises(ModelError, match="no such file"):
        with_loras(spec, [LoraRef(str(tmp_path / "none.safetensors"))])


TO_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
PAIR = {"lora_up.weight": torch.ones(64, 2), "lora_down.weight": torch.ones(2, 64)}
LOKR = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(16, 16)}


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({**PAIR, "lora_B.weight": torch.ones(64, 2)}, r"lora_B.weight stands beside the same factor|lora_up.weight stands"),
        ({**PAIR, "dora_scale": torch.ones(64, 1), "lora_magnitude_vector": torch.ones(64)}, "dora_scale and magnitude"),
        ({**LOKR, "lokr_w1_a": torch.ones(4, 2)}, "lokr_w1 and lokr_w1_a, which say the same"),
        ({**LOKR, "lokr_t2": torch.ones(2, 2, 1, 1)}, "lacks its lokr_w2_a"),
        ({"oft_blocks": torch.zeros(8, 8, 8), "oft_diag": torch.zeros(8, 8, 8)}, "oft_blocks and oft_diag"),
    ],
)
def test_factors_that_contradict_each_other_are_refused(
    factors: dict[str, Tensor], words: str, tmp_path: Path, checkpoint: Get
) -> None:
    path, made = tmp_path / "a.safetensors", checkpoint("sdxl")
    save_file({f"{TO_Q}.{role}": value for role, value in factors.items()}, path)
    with pytest.raises(ModelError, match=words):
        with_loras(load_spec(str(made.path), parts=made.parts), [LoraRef(str(path))])


def test_a_weight_under_two_names_is_refused_and_an_alpha_of_zero_noted(tmp_path: Path, checkpoint: Get) -> None:
    path, spec = tmp_path / "a.safetensors", load_spec(str(checkpoint("sdxl").path))
    pairs = {f"{TO_Q}.{role}": value for role, value in PAIR.items()}
    other = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(pairs | {f"{other}.lora.{end}.weight": PAIR[f"lora_{end}.weight"] + 0 for end in ("up", "down")}, path)
    with pytest.raises(ModelError, match="are two names of one weight"):
        load_network(spec, torch.float32, CPU, [LoraRef(str(path))])
    save_file(pairs | {f"{TO_Q}.alpha": torch.tensor(0.0)}, path)
    assert "alpha is 0 in 1 of its layers" in with_loras(spec, [LoraRef(str(path))]).notes[-1]


def test_a_sparse_rest_of_no_size_is_refused() -> None:
    sparse = {"bias_indices": torch.zeros(2, 1), "bias_values": torch.ones(1), "bias_size": torch.tensor([math.inf, 1.0])}
    factors = {"up": torch.ones(4, 1), "down": torch.ones(1, 4), **sparse}
    with pytest.raises(ModelError, match="do not fit a weight"):
        merged(torch.ones(4, 4), [Change(where="x", kind="lora", tensors=factors, scale=1.0)])


def test_a_lora_is_a_path_and_a_scale() -> None:
    assert parse_lora("a/b.safetensors:0.8") == LoraRef("a/b.safetensors", 0.8)
    assert parse_lora("C:/b.safetensors") == LoraRef("C:/b.safetensors", 1.0)
    assert parse_lora("b.safetensors:-1") == LoraRef("b.safetensors", -1.0)
    for bad in ("b.safetensors:nan", "b.safetensors:1e9"):
        with pytest.raises(RequestError, match="give a scale"):
            parse_lora(bad)
    request = RenderRequest(prompt="", size=Size(8, 8), loras=(parse_lora("x:2"),))
    assert str(request.loras[0]) == "x:2"
