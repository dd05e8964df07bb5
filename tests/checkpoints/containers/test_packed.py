"""Packed weights whose scales or stated shapes do not fit are refused when the header is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hires.checkpoints.headers import read_header
from hires.errors import ModelError
from hires.models.storage.reading import read_tensors

STATE = "a.weight.quant_state.bitsandbytes__nf4"


def nf4(state: object, **changes: Tensor) -> dict[str, Tensor]:
    """A weight (4, 64) in NF4; `changes` replace tensors, or take them away where empty."""
    raw = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    parts = {"absmax": torch.ones(4), "quant_map": torch.linspace(-1, 1, 16)} | changes
    tensors = {f"a.weight.{name}": value for name, value in parts.items() if value.numel() and name != "weight"}
    return tensors | {"a.weight": changes.get("weight", torch.zeros(128, 1, dtype=torch.uint8)), STATE: raw}


BYTES = torch.zeros(4, dtype=torch.uint8)
GOOD = {"shape": [4, 64], "blocksize": 64}
DAMAGED = {
    "no shape": nf4({"blocksize": 64}),
    "a shape of texts": nf4({"shape": ["x", 64]}),
    "a negative shape": nf4({"shape": [-4, -64]}),
    "blocks of nothing": nf4(GOOD | {"blocksize": 0}),
    "blocks of half a value": nf4(GOOD | {"blocksize": 64.5}),
    "an offset that is no number": nf4(GOOD | {"nested_offset": "x"}),
    "an offset without end": nf4(GOOD | {"nested_offset": float("inf")}),
    "too few scales": nf4(GOOD, absmax=torch.ones(3)),
    "a short map": nf4(GOOD, quant_map=torch.ones(8)),
    "scales in 8 bits alone": nf4(GOOD, absmax=BYTES),
    "nested scales that are too many": nf4(
        GOOD, absmax=BYTES, nested_absmax=torch.ones(2), nested_quant_map=torch.linspace(-1, 1, 256)
    ),
    "nested scales beside whole ones": nf4(GOOD, nested_absmax=torch.ones(1), nested_quant_map=torch.ones(256)),
    "codes of another type": nf4(GOOD, weight=torch.zeros(128, 1, dtype=torch.int8)),
    "JSON without end": {**nf4(GOOD), STATE: torch.frombuffer(bytearray(b"[" * 100_000), dtype=torch.uint8)},
    "int8 with too few scales": {"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.SCB": torch.ones(3)},
    "an int8 kernel": {"a.weight": torch.zeros(4, 4, 1, 1, dtype=torch.int8), "a.SCB": torch.ones(4)},
    "a scale of a lone number": {"a.weight": torch.zeros(()).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(2)},
    "two scales": {
        "a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1), "a.weight_scale": torch.ones(1)
    },
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_scales_that_do_not_fit_are_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(DAMAGED[what], path)
    with pytest.raises(ModelError, match=r"a\.safetensors: "):
        read_header(path)


def test_blocks_are_told_from_rows_where_there_are_as_many(tmp_path: Path) -> None:
    scale = torch.arange(1.0, 9.0)[None]  # of 8 blocks along the columns, not of the 8 rows
    save_file(
        {"a.weight": torch.ones(8, 1024).to(torch.float8_e4m3fn), "a.weight_scale_inv": scale}, tmp_path / "a.safetensors"
    )
    weight = read_tensors(tmp_path / "a.safetensors")["a.weight"]
    assert torch.equal(weight, scale.repeat_interleave(128, 1).expand(8, -1))


def test_metadata_that_name_no_layers_are_refused(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"_quantization_metadata": '{"layers": [1]}'})
    with pytest.raises(ModelError, match="names no layers"):
        read_header(tmp_path / "a.safetensors")
