"""What a checkpoint is: every family in every layout, hints, contradictions, refusals by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hires.checkpoints.detect_file import identify_file
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.headers import read_header
from hires.checkpoints.locate import TOKENIZERS, wanted_files
from hires.checkpoints.spec import load_spec
from hires.engine.engine import plan, render
from hires.errors import ModelError, RequestError
from tests.support.checkpoints import Checkpoint, autoencoder, make, marks, pixart, unet
from tests.support.original_names import pixart_to_pth, unet_to_ldm, vae_to_ldm

Get = Callable[..., Checkpoint]


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_found_in_every_layout(family: str, layout: str, checkpoint: Get) -> None:
    facts, made = FAMILIES[family], checkpoint(family, layout)
    named = family if facts.same_keys_as else None
    spec = load_spec(str(made.path), family=named, parts=made.parts)
    assert spec.family == family
    assert spec.parameterisation == facts.parameterisation
    assert spec.latent_scale == facts.latent_scale
    assert spec.facts.size_conditions == facts.size_conditions
    assert spec.zero_terminal_snr == (facts.parameterisation == "v")
    low, high = {"edm_v": (0.002, 120.0), "v": (0.0292, 4518.76)}.get(facts.parameterisation, (None, None))
    if facts.parameterisation == "eps":
        low, high = (0.01, 157.407) if facts.network == "pixart" else (0.0292, 14.6146)
        high = 2.0411 if facts.start_timestep == 400 else high
    assert (spec.sigma_min, spec.sigma_max) == pytest.approx((low, high), rel=2e-3)
    assert not spec.missing
    wanted = sum(p.numel() for p in made.network.parameters())
    assert spec.network_params == wanted
    assert spec.text_params == sum(p.numel() for tower in made.texts for p in tower.parameters()) + _leftovers(
        spec.family, layout
    )
    assert spec.network.latent_channels == 4
    if layout == "file" and facts.network == "pixart":
        assert spec.native_px == facts.native_px


def _leftovers(family: str, layout: str) -> int:
    """Tensors in single files that are no weights: position ids, and OpenCLIP's logit scale."""
    if layout == "folder" or FAMILIES[family].network == "pixart":
        return 0
    return 77 + (len(FAMILIES[family].text) == 2)


def test_the_sigmas_are_those_of_the_file(tmp_path: Path) -> None:
    for family in ("cosxl", "cosxl-edit"):
        for dtype in (torch.float32, torch.bfloat16):
            made = make(tmp_path / f"{family}{dtype}", family, sigmas=(0.01, 100.0), dtype=dtype)
            found = identify_file(made.path)
            assert found.sigma_range == pytest.approx((0.01, 100.0), rel=4e-3 if dtype == torch.bfloat16 else 0)
            assert any("sigma_max 100" in reason for reason in found.why)


def test_keys_cannot_tell_delta_so_the_user_or_the_name_does(tmp_path: Path, checkpoint: Get) -> None:
    plain = checkpoint("pixart-alpha-1024")
    assert load_spec(str(plain.path)).family == "pixart-alpha-1024"
    hinted = tmp_path / "pixart_LCM.pth"
    shutil.copy(plain.path, hinted)
    spec = load_spec(str(hinted))
    assert spec.family == "pixart-delta"
    assert spec.defaults == FAMILIES["pixart-delta"].defaults
    assert "in its name" in spec.notes[0]
    assert "`family` pixart-alpha-1024" in spec.notes[0]
    assert load_spec(str(hinted), family="pixart-alpha-1024").family == "pixart-alpha-1024"


@pytest.mark.parametrize("family", [name for name, facts in FAMILIES.items() if facts.same_keys_as])
def test_what_shares_its_keys_is_what_the_user_says(family: str, checkpoint: Get) -> None:
    base = checkpoint(FAMILIES[family].same_keys_as)
    assert load_spec(str(base.path), family=family).defaults == FAMILIES[family].defaults


@pytest.mark.parametrize(
    ("family", "claimed"),
    [
        ("cosxl", "sdxl"),
        ("sdxl", "cosxl"),
        ("sd15", "sdxl-turbo"),
        ("pixart-sigma-256", "pixart-alpha-256"),
        ("sdxl", "pixart-dmd"),
    ],
)
def test_a_claim_against_the_keys_is_refused_and_the_right_one_named(family: str, claimed: str, checkpoint: Get) -> None:
    for layout in ("file", "folder"):
        with pytest.raises(ModelError, match=rf"family {claimed}: .* is {family} \("):
            load_spec(str(checkpoint(family, layout).path), family=claimed)
    with pytest.raises(ModelError, match="did you mean 'sdxl-turbo'"):
        load_spec(str(checkpoint("sdxl").path), family="sdxl-turbot")


def ldm_file(path: Path, channels: int = 4, **extra: Tensor) -> Path:
    state = {f"model.diffusion_model.{k}": v.contiguous() for k, v in unet_to_ldm(unet("sdxl", channels)).items()}
    save_file(state | {key.replace("__", "."): value for key, value in extra.items()}, path)
    return path


def test_models_that_are_not_supported_are_refused_by_name(tmp_path: Path) -> None:
    one = torch.ones(2)
    cases = {
        "inpainting": ldm_file(tmp_path / "a.safetensors", 9),
        "Playground 2.5": ldm_file(tmp_path / "b.safetensors", edm_mean=one, edm_std=torch.ones(1)),
        "refiner": ldm_file(tmp_path / "c.safetensors", conditioner__embedders__0__model__ln_final=one),
        "CustomNet": ldm_file(tmp_path / "d.safetensors", cc_projection__weight=one),
        "Flux": tmp_path / "e.safetensors",
        "in diffusers' naming": tmp_path / "g.safetensors",
        "no known kind": tmp_path / "h.safetensors",
        "150 text tokens": tmp_path / "i.pth",
        "PixArt of a size that is not known": tmp_path / "j.pth",
    }
    save_file({"model.diffusion_model.double_blocks.0.x": one}, cases["Flux"])
    save_file({"down_blocks.0.resnets.0.conv1.weight": one}, cases["in diffusers' naming"])
    save_file({"something": one}, cases["no known kind"])
    state = pixart_to_pth(pixart("pixart-sigma-256"), "pixart-sigma-256")
    torch.save(state | {"y_embedder.y_embedding": torch.zeros(150, 32)}, cases["150 text tokens"])
    torch.save(state | {"pos_embed": torch.zeros(1, 49, 144)}, cases["PixArt of a size that is not known"])
    for words, path in cases.items():
        with pytest.raises(ModelError, match=words):
            load_spec(str(path))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj"}, "Kolors"),
        ({"projection_class_embeddings_input_dim": 2560}, "the SDXL refiner"),
        ({"addition_embed_type": "image"}, "Kandinsky 2"),
        ({"in_channels": 9}, "an inpainting model"),
    ],
)
def test_folders_of_other_unets_are_refused_by_name(
    changes: dict[str, object], name: str, tmp_path: Path, checkpoint: Get
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sdxl", "folder").path, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=name):
        load_spec(str(folder))


def test_a_pth_without_its_position_table_needs_the_family(tmp_path: Path) -> None:
    state = pixart_to_pth(pixart("pixart-sigma-512"), "pixart-sigma-512")
    del state["pos_embed"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="give `family`, one of pixart-sigma-256"):
        load_spec(str(tmp_path / "a.pth"))
    spec = load_spec(str(tmp_path / "a.pth"), family="pixart-sigma-512")
    assert (spec.family, spec.native_px) == ("pixart-sigma-512", 512)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "state_dict_ema"])
def test_a_pth_is_found_with_and_without_a_wrapper(wrapper: str | None, tmp_path: Path) -> None:
    made = make(tmp_path, "pixart-alpha-1024", wrapper=wrapper, kv={1: 2})
    found = identify_file(made.path)
    assert (found.family, found.prefix) == ("pixart-alpha-1024", "" if wrapper is None else f"{wrapper}.")
    assert found.size_conditions
    spec = load_spec(str(made.path))
    assert spec.network.kv_compression == (1, 2)  # type: ignore[union-attr]


def test_a_pth_of_alpha_1024_without_size_conditions_is_run_without(tmp_path: Path) -> None:
    state = pixart_to_pth(pixart("pixart-alpha-512"), "pixart-alpha-512") | {"pos_embed": torch.zeros(1, 4096, 144)}
    torch.save(state, tmp_path / "a.pth")
    spec = load_spec(str(tmp_path / "a.pth"))
    assert (spec.family, spec.facts.size_conditions) == ("pixart-alpha-1024", None)


def test_autoencoders_and_loras_are_no_models(tmp_path: Path, checkpoint: Get) -> None:
    save_file({key: value.contiguous() for key, value in vae_to_ldm(autoencoder()).items()}, tmp_path / "vae.safetensors")
    assert identify_file(tmp_path / "vae.safetensors").kind == "vae"
    with pytest.raises(ModelError, match="an autoencoder alone"):
        load_spec(str(tmp_path / "vae.safetensors"))
    save_file({"lora_unet_mid_block_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="give it with `loras`"):
        load_spec(str(tmp_path / "lora.safetensors"))


def test_flags_alone_decide_between_the_sdxl_kinds(tmp_path: Path, checkpoint: Get) -> None:
    """The same weights with other marks."""
    plain = load_file(checkpoint("sdxl").path)
    for family in ("cosxl", "sdxl-v", "sdxl"):
        path = tmp_path / f"{family}.safetensors"
        save_file(plain | marks(family, (0.01, 100.0)), path)
        assert identify_file(path).family == family
    save_file(plain | {"edm_vpred.sigma_max": torch.tensor(math.nan)}, path)
    with pytest.raises(ModelError, match="is no range"):
        identify_file(path)
    assert "edm_vpred.sigma_max" in read_header(path).tensors


def test_a_model_that_edits_is_refused_in_text_to_image_with_the_next_move(checkpoint: Get) -> None:
    for layout in ("file", "folder"):
        made = checkpoint("cosxl-edit", layout)
        with pytest.raises(RequestError, match=r"8 input channels.*hires edit"):
            render("", size="1024x1024", model=str(made.path))
        costs = [
            plan(size="1024x1024", model=str(checkpoint(family, layout).path), vram="24GB", steps=20).costs[0].flops
            for family in ("cosxl", "cosxl-edit")
        ]
        assert costs[1] == pytest.approx(1.5 * costs[0], rel=0.01)  # three estimates a step instead of two


def test_folders_of_pixart_without_a_pipeline_are_told_apart(tmp_path: Path, checkpoint: Get) -> None:
    """A transformer alone, as 2K is published, with the class name that old files have and no word of size conditions."""
    for family in ("pixart-sigma-2k", "pixart-alpha-1024", "pixart-sigma-1024"):
        folder = tmp_path / family
        shutil.copytree(checkpoint(family, "folder").path / "transformer", folder)
        config = json.loads((folder / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
        del config["use_additional_conditions"]
        (folder / "config.json").write_text(json.dumps(config))
        spec = load_spec(str(folder))
        assert (spec.family, spec.facts.size_conditions) == (family, FAMILIES[family].size_conditions)
        assert {part.component for part in spec.missing} == {"vae", "text_encoder"}
        parts = checkpoint(family, "folder").path
        assert not load_spec(str(folder), parts=parts).missing


def test_an_unknown_repository_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def refused(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refused)
    with pytest.raises(ModelError, match=r"no route to host.*hf download nobody/nothing"):
        load_spec("nobody/nothing")


def test_of_a_repository_only_what_runs_is_fetched() -> None:
    names = [
        "model_index.json", "sd_xl_base_1.0.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx", "tokenizer/merges.txt", "tokenizer/spiece.model",
        "text_encoder/model-00001-of-00002.safetensors", "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.non_ema.safetensors",
    ]  # fmt: skip
    left = {names[i] for i in (1, 4, 5, 9, 11)}
    assert set(wanted_files(names)) == set(names) - left


def test_a_repository_in_the_local_cache_needs_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Get
) -> None:
    """The model itself, and parts that a single file lacks."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    file, folder = checkpoint("sdxl"), checkpoint("sdxl", "folder")
    assert load_spec(str(file.path)).parts["tokenizer"].path == TOKENIZERS / "clip"
    root = tmp_path / "models--stabilityai--stable-diffusion-xl-base-1.0"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    shutil.copytree(folder.path, root / "snapshots" / "abc")
    assert load_spec("stabilityai/stable-diffusion-xl-base-1.0").family == "sdxl"
    assert not load_spec(str(file.path)).missing
