"""Packed weights and other containers reach a model's modules as the weights that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hires.checkpoints.headers import read_header
from hires.checkpoints.spec import load_spec
from hires.models.loading import load_network, load_vae
from hires.models.storage.packed import Packed
from hires.models.storage.reading import read_tensors, stored_tensors
from hires.models.text_encoders import load_clip
from tests.models.storage.test_bitsandbytes import NF4
from tests.support.checkpoints import Checkpoint
from tests.support.headers import write_gguf

Get = Callable[..., Checkpoint]
State = dict[str, Tensor]
CPU = torch.device("cpu")
SCALE = 0.01


class Kind(NamedTuple):
    """pack: the stored tensors of a weight. storage: its name for people. error: the most that a weight differs, relative."""

    pack: Callable[[str, Tensor], State]
    storage: str
    error: float


def _old_fp8(name: str, weight: Tensor) -> State:
    layer = name.removesuffix(".weight")
    return {name: (weight / SCALE).to(torch.float8_e4m3fn), f"{layer}.scale_weight": torch.tensor(SCALE)}


def _row_fp8(name: str, weight: Tensor) -> State:
    layer, rows = name.removesuffix(".weight"), weight.abs().amax(1, keepdim=True) / 448
    return {
        name: (weight / rows).to(torch.float8_e4m3fn),
        f"{layer}.weight_scale": rows,
        f"{layer}.input_scale": torch.ones(()),
    }


def _int8(name: str, weight: Tensor) -> State:
    layer, largest = name.removesuffix(".weight"), weight.abs().amax(1)
    return {
        name: (weight * 127 / largest[:, None]).round().to(torch.int8),
        f"{layer}.SCB": largest,
        f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def _nf4(name: str, weight: Tensor) -> State:
    blocks = weight.flatten().reshape(-1, 64)
    largest = blocks.abs().amax(1)
    table = torch.tensor(NF4)
    codes = ((blocks / largest[:, None])[..., None] - table).abs().argmin(-1).to(torch.uint8).flatten()
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape), "dtype": "float16"}).encode()
    return {
        name: (codes[0::2] << 4 | codes[1::2])[:, None],
        f"{name}.absmax": largest,
        f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(state), dtype=torch.uint8),
    }


KINDS = {
    "old fp8": Kind(_old_fp8, "scaled fp8", 0.08),
    "fp8 by row": Kind(_row_fp8, "scaled fp8", 0.08),
    "int8": Kind(_int8, "int8", 0.02),
    "nf4": Kind(_nf4, "NF4", 0.25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_of_a_whole_file_are_widened(kind: str, tmp_path: Path, checkpoint: Get) -> None:
    """UNet and both text towers, joint projections among them; the same weights plain are the reference."""
    made, (pack, storage, error) = checkpoint("sdxl"), KINDS[kind]
    plain = load_file(made.path)
    names = [name for name, value in plain.items() if value.ndim == 2 and name.endswith(".weight") and ".first" not in name]
    names = [name for name in names if not name.startswith("first_stage_model") and "embedding" not in name]
    packed: State = {key: value for name in names for key, value in pack(name, plain[name]).items()}
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in (plain | packed).items()}, path)
    stored = stored_tensors(path)
    assert {name for name, value in stored.items() if isinstance(value, Packed)} == set(names)
    spec, wanted = load_spec(str(path), parts=made.parts), load_spec(str(made.path), parts=made.parts)
    assert read_header(path).storage == storage
    assert (spec.network_params, spec.text_params) == (wanted.network_params, wanted.text_params)
    for load in (
        lambda spec: load_network(spec, torch.float32, CPU),
        lambda spec: load_clip(spec, "text_encoder_2", torch.float32, CPU),
    ):
        got, reference = load(spec).state_dict(), load(wanted).state_dict()
        assert got.keys() == reference.keys()
        for name, value in reference.items():
            assert (got[name] - value).norm() <= error * value.norm(), name


def test_packed_weights_of_a_gguf_are_widened(tmp_path: Path, checkpoint: Get) -> None:
    pytest.importorskip("gguf")
    prefix = "model.diffusion_model."
    plain = {n.removeprefix(prefix): v for n, v in load_file(checkpoint("sdxl").path).items() if n.startswith(prefix)}
    entries, values = {}, {}
    for name, value in plain.items():
        blocks = value.ndim == 2 and value.shape[1] % 32 == 0
        entries[name] = ("Q8_0" if blocks else "F32", tuple(value.shape))
        values[name] = _q8_0(value) if blocks else value.numpy().tobytes()
    path = write_gguf(tmp_path / "a.gguf", entries, {"general.architecture": "sdxl"}, values)
    got = load_network(load_spec(str(path)), torch.float32, CPU).state_dict()
    wanted = load_network(load_spec(str(checkpoint("sdxl").path)), torch.float32, CPU).state_dict()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 0.01 * value.norm(), name


def _q8_0(weight: Tensor) -> bytes:
    blocks = weight.reshape(-1, 32)
    steps = (blocks.abs().amax(1) / 127).half().float()
    codes = (blocks / steps[:, None]).round().clamp(-127, 127).to(torch.int8)
    packed = torch.cat([steps.half().view(torch.uint8).reshape(-1, 2), codes.view(torch.uint8)], dim=1)
    return packed.numpy().tobytes()


@pytest.mark.parametrize("old", [False, True])
def test_a_ckpt_gives_what_its_safetensors_gives(old: bool, tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sd15")
    state = load_file(made.path) | {"model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
    spec, wanted = load_spec(str(tmp_path / "a.ckpt"), parts=made.parts), load_spec(str(made.path), parts=made.parts)
    assert (spec.network_params, spec.vae_params) == (wanted.network_params, wanted.vae_params)
    for load in (load_network, load_vae, lambda spec, dtype, device: load_clip(spec, "text_encoder", dtype, device)):
        got, reference = (load(each, torch.float32, CPU).state_dict() for each in (spec, wanted))
        assert all(torch.equal(got[name], value) for name, value in reference.items())
        assert got.keys() == reference.keys()


def test_a_float_in_8_bits_without_a_scale_is_itself(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2).to(torch.float8_e5m2)}, tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors")["a.weight"].dtype == torch.float8_e5m2
    assert read_header(tmp_path / "a.safetensors").storage == "fp8"
