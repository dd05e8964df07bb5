"""Damaged and hostile models: loaded, or refused in one sentence, and soon; a fresh seed each run, printed."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import hires
from hires.errors import HiresError, ModelError
from tests.support.checkpoints import Checkpoint

Get = Callable[[str, str], Checkpoint]
LONGEST_SECONDS = 10
ODD = (0, -1, 1, 3, 1e9, 10**9, 10**12, 10**30, 1.5, True, None, "x", "nan", [], {}, [10**9], float("nan"), float("inf"))
BROKEN = ("[" * 100_000, '{"a":' * 100_000, "", "null", "[]", "1", "{", '"x"', "\0")
NEW_KEYS = ("auto_map", "eos_token_id", "pad_token", "attention_head_dim", "act_fn", "resnet_time_scale_shift", "sample_size")


def spoiled(made: Checkpoint, folder: Path, chance: random.Random) -> str:
    """Write a copy of a model with one odd value in one of its configs; what it is."""
    shutil.copytree(made.path, folder)
    files = sorted(file for file in folder.rglob("*.json") if file.name not in ("vocab.json", "tokenizer.json"))
    file = chance.choice(files)
    where = f"{made.family} {file.relative_to(folder)}"
    if chance.random() < 0.1:
        text = chance.choice(BROKEN)
        file.write_text(text)
        return f"{where}: {text[:20]!r}"
    document = json.loads(file.read_text())
    key, value = chance.choice([*document, *NEW_KEYS]), chance.choice(ODD)
    file.write_text(json.dumps(document | {key: value}))
    return f"{where}: {key} = {value!r}"


@pytest.mark.parametrize("count", [16, pytest.param(400, marks=pytest.mark.slow)])
def test_an_odd_config_is_used_or_refused_and_soon(count: int, checkpoint: Get, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance, outcomes = random.Random(seed), Counter[str]()
    models = [checkpoint(family, "folder") for family in ("sdxl", "pixart-sigma-256")]
    for index in range(count):
        folder = tmp_path / str(index)
        what = spoiled(chance.choice(models), folder, chance)
        began = time.process_time()
        try:
            hires.render("a", model=str(folder), size="64x64", steps=1, device="cpu")
            outcomes["drawn"] += 1
        except HiresError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what} (seed {seed}) ended in {type(error).__name__}: {error}") from error
        assert time.process_time() - began < LONGEST_SECONDS, what
        shutil.rmtree(folder)
    print(dict(outcomes))
    assert outcomes["refused"], "not one of them was odd"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("unet", "layers_per_block", 10**9),
        ("unet", "transformer_layers_per_block", [1, 10**7]),
        ("unet", "sample_size", 10**12),
        ("unet", "attention_head_dim", 0),
        ("unet", "norm_num_groups", 0),
        ("unet", "time_embedding_dim", 10**12),
        ("unet", "down_block_types", "x"),
        ("unet", "act_fn", 3),
        ("unet", "cross_attention_dim", float("inf")),
        ("vae", "layers_per_block", 10**8),
        ("vae", "scaling_factor", "nan"),
        ("vae", "norm_num_groups", 0),
        ("text_encoder", "num_hidden_layers", 10**8),
        ("text_encoder", "num_attention_heads", 0),
        ("text_encoder_2", "eos_token_id", True),
    ],
)
def test_what_a_config_cannot_say_is_refused_by_its_name(
    file: str, key: str, value: object, checkpoint: Get, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("sdxl", "folder").path, folder)
    config = folder / file / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    began = time.process_time()
    with pytest.raises(ModelError, match=file):
        hires.render("a", model=str(folder), size="64x64", steps=1, device="cpu")
    assert time.process_time() - began < LONGEST_SECONDS
