"""NF4 and int8, by the codes, the map and the scales written out."""

from __future__ import annotations

import pytest
import torch

from hires.models.storage.bitsandbytes import four_bit, int8

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_high_four_bits_come_first() -> None:
    parts = {"codes": torch.tensor([[0x2F]], dtype=torch.uint8), "absmax": torch.tensor([2.0]), "quant_map": torch.tensor(NF4)}
    assert four_bit(parts, {"blocksize": 64}, (2,)).tolist() == pytest.approx([-1.0501461029, 2.0])


def test_every_block_has_its_scale_in_32_or_8_bits() -> None:
    codes = torch.full((96, 1), 0xFF, dtype=torch.uint8)
    table = torch.arange(256.0)
    plain = {"codes": codes, "absmax": torch.tensor([1.0, 2.0, 3.0]), "quant_map": torch.tensor(NF4)}
    wanted = torch.tensor([1.0, 2.0, 3.0]).repeat_interleave(64).reshape(12, 16)
    assert torch.equal(four_bit(plain, {"blocksize": 64}, (12, 16)), wanted)
    nested = plain | {
        "absmax": torch.tensor([10, 20, 30], dtype=torch.uint8),
        "nested_absmax": torch.tensor([0.1, 0.2]),
        "nested_quant_map": table,
    }
    values = {"blocksize": 64, "nested_blocksize": 2, "nested_offset": 0.5}
    got = four_bit(nested, values, (12, 16)).flatten()[[0, 64, 128]]
    assert got.tolist() == pytest.approx([10 * 0.1 + 0.5, 20 * 0.1 + 0.5, 30 * 0.2 + 0.5])


def test_int8_is_scaled_by_rows() -> None:
    got = int8(torch.tensor([[127, -127], [64, 0]], dtype=torch.int8), torch.tensor([2.0, 12.7]))
    assert got.flatten().tolist() == pytest.approx([2.0, -2.0, 6.4, 0.0])
