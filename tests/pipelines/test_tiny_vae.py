"""A small autoencoder beside the model's: previews after each step, and the last resort where no exact decode has room."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import hires
from hires.cli.app import app
from hires.errors import MemoryLadderError, ModelError
from hires.events import Event
from hires.images.formats import read_text
from hires.planning.costs.network_memory import preview_bytes
from hires.tiling.vae import TiledVAE

pytestmark = pytest.mark.usefixtures("warm")

PROMPT = "a sun on the right over green mountains and a lake at dusk"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def save_tiny(folder: Path, channels: int = 4, levels: int = 4) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    widths, blocks = (8,) * levels, (1,) * levels
    AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_every_step_has_a_preview_and_the_picture_is_the_same(tiny: Path) -> None:
    events: list[Event] = []
    options = {"size": "640x512", "steps": 2, "seed": 1}
    result = hires.render(PROMPT, tiny_vae=tiny, on_event=events.append, **options)  # type: ignore[arg-type]
    drawn = [event for event in events if event.preview is not None]
    assert [(e.stage, e.step) for e in drawn] == [(s.name, i + 1) for s in result.plan.stages for i in range(s.steps)]
    assert all(e.preview.dtype == np.uint8 and e.preview.ndim == 3 and max(e.preview.shape) <= 512 for e in drawn)
    assert drawn[-1].preview.shape == (256, 320, 3), "64 x 80 cells are pooled by 2"
    assert len({e.preview.tobytes() for e in drawn}) == len(drawn)
    assert any("previews by" in note for note in result.plan.notes)
    plain = hires.render(PROMPT, **options)  # type: ignore[arg-type]
    assert np.array_equal(plain.pixels, result.pixels)
    assert result.plan.costs[0].peak_bytes - plain.plan.costs[0].peak_bytes == preview_bytes(4, cpu=True)


def test_an_engine_holds_its_network_once_with_and_without_previews(tiny: Path) -> None:
    drawn: list[int] = []
    with hires.load(tiny_vae=tiny) as engine:
        for refine in (False, True, False):
            if refine:
                engine.upscale(np.zeros((32, 48, 3), np.uint8), scale=2, refine=True, steps=4)
            else:
                engine.render(PROMPT, size="96x64", steps=2, on_event=lambda event: drawn.append(event.preview is not None))
        assert engine.loaded.count("demo") == 1 and sum(drawn) == 4


@pytest.mark.slow
def test_it_decodes_where_every_exact_way_ran_out_of_memory(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = TiledVAE.decode_bands

    def scarce(self: TiledVAE, z: torch.Tensor, on_band: object = None, start: int = 0) -> Iterator[torch.Tensor]:
        yield from list(real(self, z))[:1]
        raise MemoryLadderError("out of memory on every rung")

    monkeypatch.setattr(TiledVAE, "decode_bands", scarce)
    with caplog.at_level(logging.WARNING, "hires.engine.run"):
        result = hires.render(PROMPT, size="256x200", steps=2, tiny_vae=tiny)
    assert result.pixels.shape == (200, 256, 3)
    assert result.plan.decode.policy == "tiny"
    assert "approximation" in result.plan.notes[-1]
    assert result.stats[-1].stage == "decode (tiny)"
    assert "decoding with the tiny autoencoder, an approximation" in caplog.text
    with pytest.raises(MemoryLadderError):
        hires.render(PROMPT, size="256x200", steps=2)


def test_the_plan_names_it_as_the_last_rung_and_only_when_asked_for(tiny: Path) -> None:
    asked, plain = hires.plan(size="1024x1024", vram="8GB", tiny_vae=tiny), hires.plan(size="1024x1024", vram="8GB")
    assert not asked.ladder[-1].exact
    assert "approximation" in asked.ladder[-1].reason
    assert all(rung.exact for rung in asked.ladder[:-1])
    assert all(rung.exact for rung in plain.ladder)


@pytest.mark.parametrize(("channels", "levels", "message"), [(16, 4, "of 16 channels"), (4, 3, "4 px a cell")])
@pytest.mark.usefixtures("cold")
def test_another_kind_is_refused(tmp_path: Path, channels: int, levels: int, message: str) -> None:
    folder = save_tiny(tmp_path / "other", channels, levels)
    with pytest.raises(ModelError, match=message):
        hires.render(PROMPT, size="64x64", steps=1, tiny_vae=folder)
    with pytest.raises(ModelError, match="give an AutoencoderTiny"):
        hires.render(PROMPT, size="64x64", steps=1, tiny_vae=Path(hires.__file__).parent / "assets" / "demo" / "vae")


def test_the_command_line_shows_the_steps(tiny: Path, tmp_path: Path) -> None:
    output, shown = tmp_path / "a.png", tmp_path / "steps.png"
    arguments = ["render", PROMPT, "--size", "128x96", "--steps", "3", "-o", str(output), "--preview", str(shown), "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--tiny-vae", str(tiny)])
    assert done.exit_code == 0, done.output
    with Image.open(shown) as picture:
        assert picture.size == (128, 128)  # the canvas
    assert "step 3 of 3" in read_text(shown)["Comment"]
    without = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert without.exit_code == 0, without.output
    with Image.open(shown) as picture:
        assert picture.size == (64, 64), "a linear map of 16 cells, four pixels each"
