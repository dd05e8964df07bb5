"""ggml's blocks, by codes written out, and the error without the package that decodes them."""

from __future__ import annotations

import struct
import sys

import pytest
import torch

from hires.errors import ModelError
from hires.models.storage.ggml import dequantised

Q4_0, Q8_0 = 2, 8


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def test_blocks_of_four_and_eight_bits() -> None:
    pytest.importorskip("gguf")
    four = torch.frombuffer(bytearray(half(0.5) + bytes([0x9F] * 16)), dtype=torch.uint8)
    got = dequantised(four, Q4_0, (1, 32))
    assert got[0, :16].tolist() == [3.5] * 16
    assert got[0, 16:].tolist() == [0.5] * 16
    eight = torch.frombuffer(bytearray(half(0.5) + struct.pack("32b", *[-3] * 32)), dtype=torch.uint8)
    assert dequantised(eight, Q8_0, (4, 8)).unique().tolist() == [-1.5]


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"needs the package gguf: pip install -e '\.\[gguf\]'"):
        dequantised(torch.zeros(18, dtype=torch.uint8), Q4_0, (1, 32))
