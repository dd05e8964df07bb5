"""Headers of weights files: whole, cut short, huge, and holding code."""

from __future__ import annotations

import json
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hires.checkpoints.headers import read_header
from hires.errors import ModelError


def test_scalars_are_read_in_every_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        path = tmp_path / f"{dtype}.safetensors".replace("torch.", "")
        save_file(
            {"big": torch.zeros(3, 5, dtype=dtype), "a": torch.tensor(120.0, dtype=dtype), "b": torch.tensor([0.5])}, path
        )
        header = read_header(path)
        assert header.scalars == {"a": 120.0, "b": 0.5}
        assert header.shapes["big"] == (3, 5)
        assert header.tensors["big"].nbytes == 15 * dtype.itemsize


def test_a_float32_scalar_is_the_decimal_that_was_meant(tmp_path: Path) -> None:
    save_file({"sigma": torch.tensor(0.002)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").scalars["sigma"] == 0.002


def test_a_file_cut_short_names_expected_and_actual_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ModelError, match=rf"{len(whole):,} bytes, the file has {len(whole) - 7:,}; damaged or cut short"):
        read_header(path)
    for short in (b"", whole[:5], whole[:20], struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(short)
        with pytest.raises(ModelError, match="no safetensors header"):
            read_header(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"__metadata__": []},
        {"__metadata__": {"title": 5}},
        {"a": {"dtype": "F32", "shape": [], "data_offsets": [2, 4]}},
        {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_metadata_that_are_no_texts_and_tensors_of_other_sizes_are_damage(changed: dict[str, object], tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}} | changed
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(ModelError, match="no safetensors header"):
        read_header(tmp_path / "a.safetensors")


def test_seven_gigabytes_take_less_than_a_second(tmp_path: Path) -> None:
    """A sparse file with the header of a real one: nothing but the header and the scalars is read."""
    path, count = tmp_path / "big.safetensors", 7 * 10**9 // 4000
    header: dict[str, object] = {
        f"layer.{i}.weight": {"dtype": "F16", "shape": [count], "data_offsets": [2 * i * count, 2 * (i + 1) * count]}
        for i in range(2000)
    }
    end = 4000 * count
    header["edm_vpred.sigma_max"] = {"dtype": "F32", "shape": [], "data_offsets": [end, end + 4]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.seek(8 + len(text) + end)
        stream.write(struct.pack("<f", 120.0))
    assert path.stat().st_size > 6.9e9
    begun = time.perf_counter()
    assert read_header(path).scalars == {"edm_vpred.sigma_max": 120.0}
    assert time.perf_counter() - begun < 1


def test_a_pth_is_read_without_its_tensors(tmp_path: Path) -> None:
    path, layer = tmp_path / "a.pth", torch.nn.Linear(6, 4)
    torch.save({"state_dict": layer.state_dict(), "ema": {"x": torch.nn.Parameter(torch.zeros(2).half())}, "epoch": 1}, path)
    header = read_header(path)
    assert header.shapes == {"state_dict.weight": (4, 6), "state_dict.bias": (4,), "ema.x": (2,)}
    assert [info.dtype for info in header.tensors.values()] == ["F32", "F32", "F16"]


class Attack:
    """What a malicious file does: runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        import os

        return os.system, (f"touch {self.target}",)


def test_a_pickle_with_code_is_refused_by_name_and_does_not_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "bad.pth", tmp_path / "touched"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "extra": Attack(touched)}, path)
    with pytest.raises(ModelError, match=r"holds code \(posix\.system\)"):
        read_header(path)
    assert not touched.exists()


def test_pickles_without_a_zip_and_other_files_are_refused_with_the_next_move(tmp_path: Path) -> None:
    old = tmp_path / "old.ckpt"
    old.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ModelError, match=r"a pickle that torch\.save did not write; give a \.safetensors"):
        read_header(old)
    other = tmp_path / "a.pth"
    other.write_bytes(b"GIF89a nothing here")
    with pytest.raises(ModelError, match="neither safetensors nor"):
        read_header(other)
    torch.save({"w": torch.zeros(1000)}, other)
    other.write_bytes(other.read_bytes()[:-200])
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_header(other)


def test_no_damage_gets_past_the_error_tree(tmp_path: Path) -> None:
    """Bytes of a .pth changed at random, and JSON of a safetensors header that says odd things: a header or a ModelError."""
    draw, refused = random.Random(5), 0
    torch.save({"state_dict": {"w": torch.zeros(2, 2), "h": torch.zeros(3).half()}, "epoch": [1, 2]}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for _ in range(150):
        path = tmp_path / "a.pth"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                changed = bytearray(content)
                for _ in range(draw.randint(1, 3) if name.endswith("data.pkl") else 0):
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
                archive.writestr(name, bytes(changed))
        refused += _refused(path)
    good = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
    odd: list[object] = [None, 3, [], [1, "x"], [-1, 12], [0.5], [2**70, 1], "F7", {}]
    for field, value in ((field, value) for field in good for value in odd):
        text = json.dumps({"w": good | {field: value}}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
        refused += _refused(tmp_path / "a.safetensors")
    assert refused > 80


def _refused(path: Path) -> bool:
    try:
        read_header(path)
    except ModelError:
        return True
    return False
