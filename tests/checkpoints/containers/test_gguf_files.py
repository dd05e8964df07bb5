"""The header of a .gguf: shapes, types, places, and what is refused."""

from __future__ import annotations

import contextlib
import random
import struct
from pathlib import Path

import pytest

from hires.checkpoints.headers import read_header
from hires.errors import ModelError
from tests.support.headers import write_gguf


def test_shapes_are_turned_round_or_the_original_ones(tmp_path: Path) -> None:
    entries = {"a": ("F16", (3, 5)), "b": ("Q4_K", (4, 256)), "c": ("Q8_0", (2, 64))}
    facts: dict[str, str | list[int]] = {"general.architecture": "sdxl", "comfy.gguf.orig_shape.b": [32, 32]}
    header = read_header(write_gguf(tmp_path / "a.gguf", entries, facts))
    assert header.shapes == {"a": (3, 5), "b": (32, 32), "c": (2, 64)}
    assert [info.nbytes for info in header.tensors.values()] == [30, 4 * 144, 4 * 34]
    assert header.storage == "GGUF Q4_K, Q8_0"
    assert header.packed.keys() == {"b", "c"}


def test_a_file_that_is_damaged_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"a": ("F16", (300, 5))}, {"general.architecture": "sdxl"})
    whole = path.read_bytes()
    for changed, words in (
        (whole[:-100], "cut short"),
        (whole[:40], "no whole .gguf"),
        (whole[:4] + b"\x01" + whole[5:], "version 1"),
        (whole.replace(b"sdxl", b"wan\0"), "architecture"),
        (whole[:8] + b"\xff" * 8 + whole[16:], "no whole .gguf"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ModelError, match=words):
            read_header(path)


def test_no_damage_gets_past_the_error_tree(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a.gguf", {"a": ("Q8_0", (2, 64))}, {"general.architecture": "sd1", "comfy.gguf.orig_shape.a": [64, 2]}
    )
    whole, draw = path.read_bytes(), random.Random(3)
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(whole) - 200)] = draw.randrange(256)
        path.write_bytes(changed)
        with contextlib.suppress(ModelError):
            read_header(path)


@pytest.mark.parametrize(
    ("kind", "shape", "given"), [("F16", (2, 3), [-2, -3]), ("F16", (2, 3), [6, 0]), ("Q8_0", (0, 32), [])]
)
def test_shapes_that_no_tensor_has_are_refused(kind: str, shape: tuple[int, ...], given: list[int], tmp_path: Path) -> None:
    facts = {"comfy.gguf.orig_shape.a": given} if given else {}
    path = write_gguf(tmp_path / "a.gguf", {"a": (kind, shape), "b": ("F32", (8,))}, facts)
    with pytest.raises(ModelError, match="download it again"):
        read_header(path)


def test_an_original_shape_of_texts_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"a": ("F16", (2, 1))}, {"comfy.gguf.orig_shape.a": [2, 1]})
    numbers, texts = struct.pack("<IIQ2i", 9, 5, 2, 2, 1), struct.pack("<IIQQQ", 9, 8, 1, 0, 0)[:-8]
    path.write_bytes(path.read_bytes().replace(numbers, texts))
    with pytest.raises(ModelError, match="download it again"):
        read_header(path)
