"""`hires inspect` as a user meets it: JSON, text, files that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

import hires
from hires.checkpoints.families import FAMILIES
from hires.cli.app import app
from tests.support.checkpoints import Checkpoint, lora, make
from tests.support.speed import half_a_second, processor_seconds

Get = Callable[..., Checkpoint]


def run(*args: str | Path | None) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_described_in_json_and_in_words(family: str, layout: str, checkpoint: Get) -> None:
    made, facts = checkpoint(family, layout), FAMILIES[family]
    options = ["--family", family] if facts.same_keys_as else []
    options += ["--parts", str(made.parts)] if made.parts else []
    code, stdout, stderr = run("inspect", made.path, "--json", *options)
    assert (code, stderr) == (0, "")
    document = json.loads(stdout)
    assert (document["family"], document["title"], document["missing"]) == (family, facts.title, [])
    network = document["components"]["network"]
    assert network["parameters"] == sum(p.numel() for p in made.network.parameters())
    assert network["bytes"] == 4 * network["parameters"]
    assert network["dtypes"] == ["F32"]
    assert document["defaults"]["sampler"] == facts.defaults.sampler
    assert document["sigma_from_file"] == (facts.parameterisation == "edm_v")
    assert document["command"].startswith("hires edit" if facts.image_channels else "hires render")
    assert all(option in document["command"] for option in options)
    code, stdout, _ = run("inspect", made.path, *options)
    assert code == 0
    assert f"{facts.title} ({family})" in stdout
    assert all(reason in stdout for reason in document["why"])


def test_what_is_missing_is_named_with_the_places_and_the_next_move(checkpoint: Get) -> None:
    made = checkpoint("pixart-sigma-2k")
    code, stdout, _ = run("inspect", made.path)
    assert code == 0
    for component in ("vae", "text_encoder"):
        assert f"missing    {component}, looked in {made.path.parent / component}" in stdout
    assert "--parts" in stdout
    assert "hf download PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers" in stdout


def test_sigmas_of_the_file_are_printed(tmp_path: Path) -> None:
    made = make(tmp_path, "cosxl", sigmas=(0.01, 100.0))
    assert "edm_v, sigma 0.01 to 100 (read from the file)" in run("inspect", made.path)[1]


def test_loras_and_autoencoders_are_described(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    tiny = lora(tmp_path / "lcm.safetensors", made, "kohya")
    document = json.loads(run("inspect", tiny.path, "--json")[1])
    assert (document["kind"], document["profile"]) == ("lora", "lcm")
    assert "profile    lcm: a run with it takes few steps, unless --few-step is none" in run("inspect", tiny.path)[1]
    assert "LoRA layers of rank 3" in run("inspect", tiny.path)[1]
    code, stdout, _ = run("inspect", checkpoint("sdxl", "folder").path / "vae")
    assert code == 0
    assert "autoencoder" in stdout


def test_the_demo_model_is_described() -> None:
    code, stdout, _ = run("inspect", "demo")
    assert code == 0
    assert "CosXL (cosxl)" in stdout
    assert "sigma 0.002 to 20 (read from the file)" in stdout


def test_bad_files_are_one_line_and_exit_code_2(tmp_path: Path, checkpoint: Get) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint("sdxl").path.read_bytes()[:-10])
    odd = tmp_path / "odd.safetensors"
    save_file({}, odd)
    text = tmp_path / "a.txt"
    text.write_text("hello")
    for args, words in (
        ([cut], "damaged or cut short"), ([odd], "no known kind"), ([text], "neither safetensors"),
        ([tmp_path], "name the file"),
        ([tmp_path / "none.pth"], "no such folder or file"), ([checkpoint("sdxl").path, "--family", "cosxl"], "is sdxl"),
        ([checkpoint("sdxl").path, "--parts", tmp_path / "none"], "--parts"),
    ):  # fmt: skip
        code, stdout, stderr = run("inspect", *args)
        assert (code, stdout) == (2, "")
        assert words in stderr
        assert "Traceback" not in stderr
        assert len(stderr.strip().splitlines()) == 1


def test_planning_for_a_file_needs_no_torch_and_half_a_second(checkpoint: Get) -> None:
    """Processor seconds, of the child alone: what the command costs, not what else the machine does."""
    for family in ("cosxl", "sdxl"):
        made = checkpoint(family)
        code = (
            "import sys; from hires.cli.app import app\n"
            f"try: app(['plan', '--size', '2048x2048', '--model', {str(made.path)!r}, '--vram', '8GB', '--json'])\n"
            "except SystemExit as stop: assert not stop.code, stop.code\n"
            "assert 'torch' not in sys.modules\n"
        )
        assert any(processor_seconds(code)[0] < half_a_second() for _ in range(2))


def test_options_of_a_model_reach_the_plan(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    tiny = lora(tmp_path / "style.safetensors", made, "kohya")
    args = ["plan", "--size", "1024x1024", "--vram", "24GB", "--model", made.path, "--lora", f"{tiny.path}:0.5"]
    code, stdout, stderr = run(*args)
    assert code == 0, stderr
    assert "LoRA style.safetensors merged at 0.5" in stdout
    code, _, stderr = run(*args, "--lora", "none.safetensors")
    assert (code, "no such file" in stderr) == (2, True)
    code, _, stderr = run("render", "x", "-o", tmp_path / "a.png", "--size", "64x64", "--model", made.path)
    assert code == 2
    assert "a vocabulary of 49408 words, the text tower knows 514; give --parts" in stderr


def test_python_gets_the_same_as_a_value(tmp_path: Path, checkpoint: Get) -> None:
    found = hires.inspect("demo")
    assert json.loads(run("inspect", "demo", "--json")[1]) == json.loads(json.dumps(found.to_json()))
    assert (found.kind, found.family, found.missing) == ("model", "cosxl", ())
    assert repr(found) == found.explain() and f"{found!r}\n" == run("inspect", "demo")[1]
    lacking = hires.inspect(checkpoint("pixart-sigma-2k").path)
    assert lacking.missing == ("vae", "text_encoder") and "missing    vae" in repr(lacking)
    style = hires.inspect(lora(tmp_path / "style.safetensors", checkpoint("sdxl"), "kohya").path)
    assert (style.kind, style.missing) == ("lora", ()) and style.family is not None and "text width" in style.family
    vae = hires.inspect(checkpoint("sdxl", "folder").path / "vae")
    assert (vae.kind, vae.family, "autoencoder" in vae.explain()) == ("vae", None, True)
    with pytest.raises(hires.errors.ModelError, match="did you mean 'demo'"):
        hires.inspect("demmo")
    with pytest.raises(hires.errors.RequestError, match="parts"):
        hires.inspect("demo", parts=tmp_path / "none")


def test_inspecting_loads_no_torch_and_shadows_nothing() -> None:
    code = (
        "import inspect, sys, hires\n"
        "assert hires.inspect('demo').kind == 'model' and not {'torch', 'numpy'} & set(sys.modules)\n"
        "assert inspect.isfunction(hires.inspect) and callable(inspect.signature)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
