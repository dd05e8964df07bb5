from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks.demo.scenes import draw, scene
from hires.cli.app import app
from hires.engine.vae_roundtrip import RoundTripOptions, vae_roundtrip
from hires.errors import BudgetError, ModelError, OutputError, RequestError
from hires.tiling.geometry import Size


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "in.png"
    Image.fromarray((draw(scene(3), Size(203, 150)) * 255).astype(np.uint8)).save(path)
    return path


def test_every_policy_gives_the_same_picture_of_the_input_size(picture: Path, tmp_path: Path) -> None:
    found = []
    for policy in ("whole", "bands", "recompute_conv"):
        result = vae_roundtrip(picture, tmp_path / f"{policy}.png", RoundTripOptions(policy=policy, band_px=16))
        assert result.psnr_db > 30
        assert result.decode.policy == policy
        found.append(np.asarray(Image.open(result.path)).astype(int))
    assert found[0].shape == (203, 150, 3)
    assert all(np.abs(other - found[0]).max() <= 1 for other in found[1:])


def test_the_command(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = CliRunner().invoke(
        app, ["vae-roundtrip", str(picture), str(out), "--vram", "12MB", "--band", "16", "--json", "--quiet"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["size"] == "150x203"
    assert document["decode"]["policy"] in ("bands", "recompute_up", "recompute_conv")
    assert document["decode"]["peak_bytes"] <= 12e6


def test_a_small_autoencoder_goes_through_in_bands(picture: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(tmp_path / "tiny")  # fmt: skip
    found = []
    for band in (None, 24):
        result = vae_roundtrip(picture, tmp_path / f"{band}.png", RoundTripOptions(vae=str(tmp_path / "tiny"), band_px=band))
        assert result.decode.policy == "halo"
        found.append(np.asarray(Image.open(result.path)).astype(int))
    assert result.decode.band_rows == 24
    assert np.abs(found[0] - found[1]).max() <= 1
    with pytest.raises(RequestError, match=r"policy 'bands'.*leave it out"):
        vae_roundtrip(picture, tmp_path / "out.png", RoundTripOptions(vae=str(tmp_path / "tiny"), policy="bands"))


def test_what_cannot_be_used_is_named(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    with pytest.raises(ModelError, match=r"vae .*nothing: no folder with an autoencoder's config.json"):
        vae_roundtrip(picture, out, RoundTripOptions(vae=str(tmp_path / "nothing")))
    with pytest.raises(RequestError, match="give a picture file"):
        vae_roundtrip(Path(__file__), out)
    with pytest.raises(RequestError, match="unknown VAE policy 'fast'"):
        vae_roundtrip(picture, out, RoundTripOptions(policy="fast"))
    with pytest.raises(OutputError, match=r"must end in .png"):
        vae_roundtrip(picture, tmp_path / "out.gif")
    with pytest.raises(BudgetError, match="would do"):
        vae_roundtrip(picture, out, RoundTripOptions(vram="10kB"))
    assert not out.exists()
