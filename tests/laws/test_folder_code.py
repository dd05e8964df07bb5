"""Python files of a model folder are never run, whatever its configs name and whatever stdin answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.checkpoints import Checkpoint

Get = Callable[[str, str], Checkpoint]
AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoencoderKL", "UNet2DConditionModel")
RENDER = ["render", "a moon", "--size", "64x64", "--steps", "1"]


def plant(folder: Path, canary: Path, change: Callable[[Path, dict[str, Any]], None]) -> None:
    """A Python file beside every config that leaves `canary` behind when it is run; configs changed by `change`."""
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil:\n    from_pretrained = from_config = lambda *a, **k: Evil()\n"
    for below in {folder, *(path.parent for path in folder.rglob("*.json"))}:
        for name in ("evil.py", "pipeline.py", "modeling_evil.py", "tokenization_evil.py"):
            (below / name).write_text(code)
    for path in folder.rglob("*.json"):
        if path.name in ("vocab.json", "tokenizer.json", "special_tokens_map.json"):
            continue
        config = json.loads(path.read_text())
        change(path, config)
        path.write_text(json.dumps(config))


def auto_map(path: Path, config: dict[str, Any]) -> None:
    """Every kind of object is to come from evil.py."""
    config["auto_map"] = {kind: ["evil.Evil", None] if kind == "AutoTokenizer" else "evil.Evil" for kind in AUTO}
    config["custom_pipeline"] = "evil"


def unknown_class(path: Path, config: dict[str, Any]) -> None:
    """As `auto_map`, and the classes that transformers knows are named no more."""
    auto_map(path, config)
    if path.name == "tokenizer_config.json":
        config["tokenizer_class"] = "Evil"
    if path.parent.name.startswith("text_encoder"):
        config |= {"model_type": "evil", "architectures": ["Evil"]}


def own_modules(path: Path, config: dict[str, Any]) -> None:
    """diffusers' way: a component's class is a pair of a module of the folder and a name in it."""
    auto_map(path, config)
    if path.name == "model_index.json":
        config["_class_name"] = ["pipeline", "Evil"]
        for name in ("unet", "transformer", "vae", "scheduler", "tokenizer", "text_encoder"):
            if name in config:
                config[name] = ["evil", "Evil"]
    elif "_class_name" in config:
        config["_class_name"] = ["evil", "Evil"]


def run(arguments: list[str], canary: Path) -> subprocess.CompletedProcess[str]:
    """hires with a stdin that says yes to everything."""
    done = forked.run(*arguments, folder=canary.parent / "process", stdin="y\n" * 100)
    assert not canary.exists(), f"code of the folder was run: {arguments}"
    assert "y/N" not in done.stdout + done.stderr, "it asked whether to run the code"
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 2), done.stderr
    return done


@pytest.mark.parametrize("change", [auto_map, unknown_class, own_modules])
@pytest.mark.parametrize("family", ["pixart-sigma-256", "sd15"])
def test_no_code_of_a_model_folder_runs(
    tmp_path: Path, checkpoint: Get, family: str, change: Callable[[Path, dict[str, Any]], None]
) -> None:
    folder, canary = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(checkpoint(family, "folder").path, folder)
    plant(folder, canary, change)
    done = run([*RENDER, "--model", str(folder), "-o", str(tmp_path / "o.png")], canary)
    if change is auto_map:
        assert done.returncode == 0, f"the classes that are known are used: {done.stderr}"
    if done.returncode:
        assert str(folder) in "".join(done.stderr.split()), "the folder is named"
    run(["inspect", str(folder)], canary)


@pytest.mark.parametrize("change", [auto_map, own_modules])
def test_no_code_of_an_autoencoders_folder_runs(
    tmp_path: Path, change: Callable[[Path, dict[str, Any]], None], eps_folder: Path
) -> None:
    canary, picture = tmp_path / "ran", tmp_path / "a.png"
    shutil.copytree(eps_folder / "vae", tmp_path / "vae")
    plant(tmp_path / "vae", canary, change)
    from PIL import Image

    Image.new("RGB", (32, 32)).save(picture)
    run(["vae-roundtrip", str(picture), str(tmp_path / "o.png"), "--vae", str(tmp_path / "vae")], canary)
    run([*RENDER, "--tiny-vae", str(tmp_path / "vae"), "-o", str(tmp_path / "p.png")], canary)


def test_the_trap_works(tmp_path: Path, checkpoint: Get) -> None:
    """The same folder does run its code where that is allowed."""
    folder, canary = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(checkpoint("pixart-sigma-256", "folder").path, folder)
    plant(folder, canary, unknown_class)
    code = (
        f"from transformers import AutoTokenizer as A; A.from_pretrained({str(folder / 'tokenizer')!r}, trust_remote_code=True)"
    )
    home = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=home, capture_output=True, timeout=120, check=False)
    assert canary.exists()
