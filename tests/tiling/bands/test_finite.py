"""An autoencoder that gives NaN or infinity is an error, never a black picture; what half precision loses is computed again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import hires
from hires.cli.app import app
from hires.errors import NotFiniteError
from hires.tiling.bands.storage import VAE_POLICIES
from hires.tiling.halo import HaloVAE
from hires.tiling.vae import TiledVAE
from tests.pipelines.test_tiny_vae import save_tiny
from tests.tiling.test_halo import tiny
from tests.tiling.test_vae import small_vae

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MESSAGE = r"the autoencoder gives NaN or infinity in (rows \d+ to \d+|the whole result), in float32 too: .*download it again"


def spoil(module: nn.Module, name: str, value: float) -> None:
    with torch.no_grad():
        module.get_parameter(name).view(-1)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", VAE_POLICIES)
@pytest.mark.parametrize("name", ["conv_out.weight", "mid_block.resnets.0.conv1.weight"])
def test_weights_that_are_no_numbers_are_an_error(policy: str, dtype: torch.dtype, value: float, name: str) -> None:
    vae = small_vae().to(dtype)
    spoil(vae.decoder, name, value)  # type: ignore[arg-type]
    tiled = TiledVAE(vae, policy=policy, band_px=None if policy == "whole" else 16)
    with pytest.raises(NotFiniteError, match=MESSAGE):
        tiled.decode(torch.randn(1, 4, 8, 8).to(dtype))
    assert tiled.encode(torch.rand(1, 3, 64, 64).to(dtype)).isfinite().all(), "the encoder is whole"
    spoil(vae.encoder, name, value)  # type: ignore[arg-type]
    with pytest.raises(NotFiniteError, match=MESSAGE):
        tiled.encode(torch.rand(1, 3, 64, 64).to(dtype))


def test_rows_above_the_bad_ones_are_handed_out_first() -> None:
    """Infinity in one row of latents of a tiny autoencoder: what does not depend on it has left already."""
    vae = tiny(torch.float32)
    z = torch.randn(1, 4, 40, 3)
    z[:, :, 39] = float("nan")
    bands = HaloVAE(vae, band_px=8).decode_bands(z)
    assert next(bands).isfinite().all()
    with pytest.raises(NotFiniteError, match=MESSAGE):
        list(bands)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_small_autoencoder_is_watched_too(dtype: torch.dtype) -> None:
    vae = tiny(torch.float32).to(dtype)
    halo = HaloVAE(vae, band_px=16)
    z, x = torch.randn(1, 4, 12, 6).to(dtype), torch.rand(1, 3, 24, 12).to(dtype)
    assert halo.decode(z).isfinite().all()
    for part, given, run in (("decoder", z, halo.decode), ("encoder", x, halo.encode)):
        spoil(vae.get_submodule(part), "layers.0.weight", float("nan"))
        with pytest.raises(NotFiniteError, match=MESSAGE):
            run(given)


def test_a_small_autoencoder_that_overflows_is_computed_again() -> None:
    vae = tiny(torch.float32)
    last = vae.get_submodule("decoder.layers")[-1]  # type: ignore[index]
    with torch.no_grad():
        vae.get_submodule("decoder.layers")[0].weight.mul_(2e5)  # type: ignore[index]
        last.weight.mul_(1e-3)
    z = torch.randn(1, 4, 12, 6)
    wanted = HaloVAE(vae, band_px=8).decode(z)
    vae.half()
    assert not vae.decode(z.half()).sample.isfinite().all()  # type: ignore[operator]
    found = HaloVAE(vae, band_px=8).decode(z.half())
    assert found.dtype == torch.float16
    assert found.isfinite().all()
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.std()


def test_the_command_ends_with_an_error_and_writes_nothing(tmp_path: Path, eps_folder: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "o.png"
    shutil.copytree(eps_folder, folder)
    (file,) = (folder / "vae").glob("*.safetensors")
    state = load_file(file)
    state["decoder.conv_out.weight"] = torch.full_like(state["decoder.conv_out.weight"], float("nan"))
    save_file(state, file)
    command = ["render", "a moon", "--size", "64x64", "--steps", "1", "--model", str(folder), "-o", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == NotFiniteError.exit_code == 1
    assert "the autoencoder gives NaN or infinity" in " ".join(result.stderr.split())
    assert not out.exists()


def test_previews_that_are_no_numbers_do_not_end_a_render(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    (file,) = folder.glob("*.safetensors")
    save_file({name: torch.full_like(part, float("nan")) for name, part in load_file(file).items()}, file)
    assert hires.render("a moon", size="64x64", steps=1, tiny_vae=folder).pixels.any()
