"""Files of torch.save, new and old: the same tensors as torch's own loader gives, and no code of the file runs."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from hires.checkpoints.containers.torch_files import OLD_MAGIC
from hires.checkpoints.headers import read_header
from hires.errors import ModelError
from hires.models.storage.reading import read_tensors


@pytest.mark.parametrize("old", [False, True])
def test_tensors_are_those_that_torch_loads(old: bool, tmp_path: Path) -> None:
    path, whole = tmp_path / "a.ckpt", torch.arange(24.0).reshape(2, 3, 4)
    odd = torch.arange(3, dtype=torch.uint8)  # what follows it in an old file lies at no multiple of its size
    state = {
        "odd": odd, "whole": whole, "view": whole[1], "turned": whole.permute(2, 0, 1), "half": torch.ones(5).half(),
        "brain": torch.ones(3).bfloat16(), "none": torch.empty(0, 4), "one": torch.tensor(120.0),
        "last": whole.to(memory_format=torch.contiguous_format)[..., 1:],
        "eight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).to(torch.float8_e4m3fn).T,
        "five": torch.arange(4.0).to(torch.float8_e5m2)[1:],
    }  # fmt: skip
    torch.save({"state_dict": state, "global_step": 5}, path, _use_new_zipfile_serialization=not old)
    read = read_tensors(path, "state_dict.")
    assert {name.removeprefix("state_dict.") for name in read} == state.keys()
    for name, value in state.items():
        got = read[f"state_dict.{name}"]
        assert got.dtype == value.dtype
        assert torch.equal(got.float(), value.float()), name
    assert read_header(path).scalars == {"state_dict.one": 120.0}


class LightningModule:
    """Stands for a class of a training tool."""

    def __init__(self) -> None:
        self.best = {"loss": 0.1}

    def __setstate__(self, state: object) -> None:
        raise AssertionError("code of the file ran")


LightningModule.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def test_records_of_training_tools_are_inert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    stand_in = types.ModuleType(LightningModule.__module__)
    stand_in.LightningModule = LightningModule  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", LightningModule.__module__):
        monkeypatch.setitem(sys.modules, name, stand_in)
    beside = {
        "callbacks": {LightningModule: LightningModule()},
        "best": np.float64(0.5),
        "arrays": np.arange(3),
        "hyper_parameters": argparse.Namespace(rate=1e-4),
        "counts": collections.Counter(a=1),
        "groups": collections.defaultdict(list, a=[1]),
        "kinds": {1, 2},
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    for old in (False, True):
        torch.save({"state_dict": {"w": torch.ones(2)}, **beside}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=not old)
        assert read_header(tmp_path / "a.ckpt").shapes == {"state_dict.w": (2,)}


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("old", [False, True])
def test_code_is_refused_by_name_and_does_not_run(old: bool, tmp_path: Path) -> None:
    path, touched = tmp_path / "a.ckpt", tmp_path / "touched"
    torch.save({"w": torch.ones(2), "x": Attack(touched)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelError, match=r"holds code \(posix\.system\)"):
        read_header(path)
    assert not touched.exists()


def test_an_old_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for length in (len(whole) - 100, 200, 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"download it again"):
            read_header(path)


def test_a_whole_module_says_what_to_save(tmp_path: Path) -> None:
    from hires.checkpoints.detect_file import identify_file

    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"save the state_dict\(\)"):
        identify_file(tmp_path / "a.pt")


def test_an_embedding_in_a_parameter_dict_is_named(tmp_path: Path) -> None:
    from hires.checkpoints.detect_file import identify_file

    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 768))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": parameters, "name": "cat"}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a textual inversion.*embedding:NAME"):
        identify_file(tmp_path / "a.pt")


def doubled() -> bytes:
    """A dict twice in the next, 40 times: 2**40 paths."""
    value: dict[str, object] = {"x": 1}
    for _ in range(40):
        value = {"a": value, "b": value}
    return pickle.dumps(value, 2)


PICKLES = {
    "dicts that are endless to walk": (doubled, "more than 300,000 objects"),
    "a key of tuples, whose hash would end the process": (
        lambda: b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
        "in one another",
    ),
    "lists in lists": (lambda: b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 200 + b"a" * 199 + b"s.", "in one another"),
    "a frame of 2**60 bytes": (lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"}.", "a pickle of more than"),
    "a string of 2**60 bytes": (lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"}.", "a pickle of more than"),
    "a memo of 2**28 places": (lambda: b"\x80\x02}r" + struct.pack("<I", 2**28) + b".", "a memo of 268435456 objects"),
    "half a million opcodes": (lambda: b"\x80\x02" + b"N0" * 250_001 + b"}.", "more than 500,000 opcodes"),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_beyond_any_state_dict_is_refused_before_it_is_built(kind: str, old: bool, tmp_path: Path) -> None:
    write, told = PICKLES[kind]
    path = tmp_path / "a.pth"
    if old:
        head = b"".join(pickle.dumps(value, 2) for value in (OLD_MAGIC, 1001, {}))
        path.write_bytes(head + write() + pickle.dumps([], 2))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", write())
    began = time.process_time()
    with pytest.raises(ModelError, match=told):
        read_header(path)
    assert time.process_time() - began < 10


def _zip(path: Path, pickled: bytes, values: bytes = bytes(64)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", values)
    return path


@pytest.mark.parametrize("name", [b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor_v2", b"argparse\nNamespace"])
def test_what_a_file_sets_on_a_class_or_function_is_gone_with_it(name: bytes, tmp_path: Path) -> None:
    set_items = b"\x80\x02c" + name + b"\n(N}X\x05\x00\x00\x00itemsK\x05stb0}."  # BUILD: setattr(global, "items", 5)
    with pytest.raises(ModelError, match="no whole file of"):
        read_header(_zip(tmp_path / "bad.ckpt", set_items))
    torch.save(collections.OrderedDict(a=torch.ones(2)), tmp_path / "good.ckpt")
    assert read_header(tmp_path / "good.ckpt").shapes == {"a": (2,)}


def _pickled(dtype: bytes, count: int = 16) -> bytes:
    """{'a': a tensor of so many values of the first storage}; dtype: what pushes the storage's type."""
    storage = b"(X\x07\x00\x00\x00storage" + dtype + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K" + bytes([count]) + b"\x85K\x01\x85\x89)tR"
    return b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s."


def test_a_type_that_is_none_is_refused(tmp_path: Path) -> None:
    good = _zip(tmp_path / "good.ckpt", _pickled(b"ctorch\nFloatStorage\n"))
    assert read_header(good).shapes == {"a": (16,)}
    with pytest.raises(ModelError, match="no whole file of"):
        read_header(_zip(tmp_path / "bad.ckpt", _pickled(b"X\x03\x00\x00\x00FOO")))


def test_a_zip_that_promises_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.ckpt", _pickled(b"ctorch\nFloatStorage\n", 255), bytes(8))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"archive/data/0") - 46  # of the directory at the end: sizes are 20 and 24 bytes in
    raw[entry + 20 : entry + 28] = (2**20).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(ModelError, match="needs"):
        read_header(path)
