"""An autoencoder given in place of the model's own: every naming is read, and another model's is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hires.checkpoints.file_states import files_of
from hires.checkpoints.spec import load_spec
from hires.engine.engine import plan
from hires.errors import ModelError
from hires.models.loading import load_vae
from hires.resume.fingerprint import fingerprints
from tests.support.checkpoints import Checkpoint, save_vae, seeded, shipped
from tests.support.headers import as_entries, narrow_vae, own_shapes, vae_shapes, write_safetensors
from tests.support.original_names import vae_to_ldm

Get = Callable[..., Checkpoint]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other() -> torch.nn.Module:
    """An autoencoder that no tiny checkpoint has."""
    from diffusers import AutoencoderKL

    config = shipped("sdxl/vae") | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 2, "sample_size": 64}
    return seeded(lambda: AutoencoderKL.from_config(config), 9)


def _write(folder: Path, naming: str, vae: torch.nn.Module) -> Path:
    ldm = {name: value.contiguous() for name, value in vae_to_ldm(vae).items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    own = dict(vae.state_dict())
    path = folder / f"{naming}.safetensors"
    if naming == "folder":
        save_vae(folder / "vae", vae, 0.13025)
        return folder / "vae"
    if naming == "folder above":
        save_vae(folder / "model" / "vae", vae, 0.13025)
        return folder / "model"
    if naming == "pt":
        torch.save({"state_dict": {f"first_stage_model.{name}": value for name, value in ldm.items()}}, folder / "a.pt")
        return folder / "a.pt"
    if naming == "loss":
        ldm |= {"loss.logvar": torch.zeros(())}
    if naming == "prefixed":
        ldm = {f"first_stage_model.{name}": value for name, value in ldm.items()}
    if naming == "old diffusers":
        for new, name in old.items():
            own = {key.replace(f".attentions.0.{new}.", f".attentions.0.{name}."): value for key, value in own.items()}
    save_file(own if "diffusers" in naming else ldm, path)
    return path


@pytest.mark.parametrize("naming", ["ldm", "prefixed", "loss", "diffusers", "old diffusers", "pt", "folder", "folder above"])
def test_a_vae_of_any_naming_takes_the_place_of_the_models_own(
    naming: str, tmp_path: Path, checkpoint: Get, other: torch.nn.Module
) -> None:
    made, path = checkpoint("sdxl"), _write(tmp_path, naming, other)
    spec = load_spec(str(made.path), parts=made.parts, vae=path)
    got = load_vae(spec, torch.float32, CPU).state_dict()
    wanted = other.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert spec.vae_params == sum(value.numel() for value in wanted.values()) + (naming == "loss")
    assert (spec.latent_scale, spec.cell_px, spec.vae.resnets) == (0.13025, 8, 2)
    note = next(note for note in spec.notes if note.startswith("VAE "))
    assert "as asked for with `vae`; latent scale 0.13025, that of SDXL" in note
    assert ("no file tells its own" in note) == ("folder" not in naming)
    assert any(str(path) in file.path for file in files_of(spec, ("network", "vae")))
    assert any(name.startswith("vae") for name in fingerprints(spec))


def test_the_plan_names_it_and_the_scale_is_the_familys(tmp_path: Path, checkpoint: Get, other: torch.nn.Module) -> None:
    made, path = checkpoint("sd15"), _write(tmp_path, "ldm", other)
    notes = plan(size="256x256", model=str(made.path), parts=made.parts, vae=path, vram="8GB").notes
    assert any(f"VAE {path}" in note and "0.18215" in note for note in notes)


def test_parts_that_are_not_used_are_named(tmp_path: Path, checkpoint: Get, other: torch.nn.Module) -> None:
    made = checkpoint("sdxl")
    parts = tmp_path / "parts"
    shutil.copytree(made.parts or tmp_path, parts)
    save_vae(parts / "vae", other, 0.13025)
    notes = load_spec(str(made.path), parts=parts).notes
    assert [note for note in notes if "is not used" in note] == [
        f"vae of `parts` is not used: that of {made.path} is; give it with `vae` to use it"
    ]
    assert not any("is not used" in note for note in load_spec(str(made.path), parts=parts, vae=parts / "vae").notes)


def test_another_models_vae_is_refused_by_name(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")

    def written(name: str, shapes: dict[str, tuple[int, ...]]) -> Path:
        return write_safetensors(tmp_path / f"{name}.safetensors", as_entries(shapes))

    def folder(name: str, config: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        return tmp_path / name

    scaled = tmp_path / "scaled"
    save_vae(scaled, made.vae, 0.18215)
    video = vae_shapes(narrow_vae()) | {"decoder.conv_in.weight": (64, 4, 3, 3, 3)}
    shallow = {"block_out_channels": [32, 64, 64], "down_block_types": ["DownEncoderBlock2D"] * 3}
    shallow |= {"up_block_types": ["UpDecoderBlock2D"] * 3}
    cases: dict[str, object] = {
        "16 latent channels, that of Flux": written("flux", vae_shapes(narrow_vae(latent_channels=16))),
        "32 latent channels, that of Flux.2": written("flux2", own_shapes(narrow_vae(latent_channels=32))),
        "an autoencoder of video": written("video", video),
        "4 px a latent cell, SDXL has 8": written("shallow", vae_shapes(narrow_vae(**shallow))),
        r"TAESD.*`tiny_vae`": written("tiny", {"decoder.layers.0.weight": (2,), "encoder.layers.0.weight": (2,)}),
        "holds no config.json": tmp_path,
        "a text encoder alone": written("clip", {"text_model.embeddings.token_embedding.weight": (2, 2)}),
        "no autoencoder .it holds x": written("x", {"x": (2,)}),
        "no such file or folder": tmp_path / "nothing.safetensors",
        r"TAESD.*`tiny_vae` ": folder("tiny", '{"_class_name": "AutoencoderTiny"}'),
        "an AutoencoderDC is not supported": folder("dc", '{"_class_name": "AutoencoderDC"}'),
        "16 latent channels": folder("sd3", '{"_class_name": "AutoencoderKL", "latent_channels": 16}'),
        r"holds no \.safetensors": folder("bin", '{"_class_name": "AutoencoderKL"}'),
        "a VAE of latent scale 0.18215, SDXL needs one of 0.13025": scaled,
        "a checkpoint of Stable Diffusion 1.5's layout, with latents of scale 0.18215": checkpoint("sd15").path,
        r"odd.config.json: is no config of a model .latent_channels 'x'": folder("odd", '{"latent_channels": "x"}'),
    }
    for words, path in cases.items():
        with pytest.raises(ModelError, match=words.strip()):
            load_spec(str(made.path), vae=str(path))
