"""8-bit floats with scales, by the codes and factors written out."""

from __future__ import annotations

import math

import torch

from hires.models.storage.fp8 import scaled


def test_codes_are_those_of_the_format_times_the_scale() -> None:
    codes = torch.tensor([[0x01, 0x08, 0x38, 0x3C, 0x7E, 0x7F]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = scaled(codes, torch.tensor(1.0))[0].tolist()
    assert values[:5] == [2**-9, 2**-6, 1.0, 1.5, 448.0]
    assert math.isnan(values[5])
    assert abs(float(scaled(codes, torch.tensor(0.01))[0, 4]) - 4.48) < 1e-6


def test_a_scale_is_of_the_tensor_of_a_row_or_of_a_block() -> None:
    codes = torch.ones(200, 130).to(torch.float8_e5m2)
    rows = torch.arange(200.0)
    for scale in (rows, rows[:, None]):
        assert torch.equal(scaled(codes, scale), rows[:, None].expand(200, 130))
    blocks = scaled(codes, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert [float(blocks[at]) for at in ((127, 127), (127, 128), (128, 127), (199, 129))] == [1.0, 2.0, 3.0, 4.0]
    kernel = torch.ones(3, 2, 3, 3).to(torch.float8_e4m3fn)
    assert scaled(kernel, torch.tensor([1.0, 2.0, 3.0]))[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]
