"""Packed weights against their formulas, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hires.models.storage.weights import NF4_CODES, Codes, packed, widened_codes

SHAPES = [(40, 64), (33, 35), (34, 40, 3, 3), (5, 7, 1, 1)]
STORAGES = ["fp8", "int8", "nf4"]
E4M3 = sorted(
    {m * 2.0**-9 for m in range(8)} | {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)


def weight_of(shape: tuple[int, ...]) -> Tensor:
    """Normal values, with rows of zeros, of one constant, of a single value, and of tiny and large ones."""
    weight = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0], weight[1], weight[2] = 0, -0.3, 0
    weight[2].view(-1)[1] = 0.7
    weight[3] *= 1e-30
    weight[4] *= 1e20
    return weight


def nearest(values: Tensor, table: list[float]) -> Tensor:
    """The entry of a table that each value is nearest to."""
    entries = torch.tensor(table, dtype=torch.float64)
    return entries[(values.reshape(-1, 1) - entries).abs().argmin(1)].reshape(values.shape)


def by_formula(weight: Tensor, storage: str) -> Tensor:
    """What a weight becomes, in float64; scales as they are stored."""
    exact = weight.double()
    if storage == "nf4":
        out = torch.zeros(weight.numel(), dtype=torch.float64)
        for start in range(0, weight.numel(), 64):
            block = exact.flatten()[start : start + 64]
            scale = block.abs().max().to(torch.bfloat16).double()
            out[start : start + 64] = nearest(block / scale, list(NF4_CODES)) * scale if scale else 0
        return out.reshape(weight.shape)
    rows = []
    for row in exact:
        scale = (row.abs().max().float() / (127 if storage == "int8" else 448)).double()
        table = [float(q) for q in range(-127, 128)] if storage == "int8" else [*(-q for q in E4M3), *E4M3]
        rows.append(nearest(row / scale, table) * scale if scale else torch.zeros_like(row))
    return torch.stack(rows)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_is_that_of_its_formula(shape: tuple[int, ...], storage: str) -> None:
    weight = weight_of(shape)
    codes = packed(weight, storage)
    found, wanted = widened_codes(codes, weight.shape, torch.float32).double(), by_formula(weight, storage)
    size = weight.double().flatten(1).abs().amax(1).clamp_min(1e-300).view(-1, *[1] * (weight.ndim - 1))
    if storage == "nf4":  # a block reaches over rows
        size = size.amax().expand_as(size)
    off = (found - wanted).abs() / size
    ties = off > 1e-6  # halfway between two codes float32 may go the other way
    assert ties.sum() <= 2 and torch.equal(found[0], torch.zeros_like(found[0]))
    assert (found - weight.double()).abs().le(wanted.sub(weight.double()).abs() + 1e-6 * size).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_weight_packs_into_its_own_codes(storage: str) -> None:
    """What was widened packs without loss, and the bytes are those of the formulas."""
    weight = 0.1 * torch.randn(48, 40, 3, 3, generator=torch.Generator().manual_seed(2))
    codes = packed(weight, storage)
    once = widened_codes(codes, weight.shape, torch.float32)
    assert torch.allclose(widened_codes(packed(once, storage), weight.shape, torch.float32), once, rtol=1e-6, atol=0)
    count = weight.numel()
    wanted = count // 64 * 34 if storage == "nf4" else count + 4 * 48
    assert codes.codes.nbytes + codes.scale.nbytes == wanted
    assert float((once - weight).norm() / weight.norm()) < {"int8": 0.01, "fp8": 0.03, "nf4": 0.1}[storage]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_weight_is_rounded_once(storage: str, dtype: torch.dtype) -> None:
    weight = 0.1 * torch.randn(40, 50, generator=torch.Generator().manual_seed(3))
    codes = packed(weight, storage)
    wide, half = (widened_codes(codes, weight.shape, kind) for kind in (torch.float32, dtype))
    step = torch.finfo(dtype).eps
    assert half.dtype == dtype and ((half.float() - wide).abs() <= step * wide.abs() + 1e-7).all()
    if storage != "nf4":  # whose table itself is rounded
        assert torch.equal(half, wide.to(dtype))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(storage: str, value: float) -> None:
    weight = torch.ones(3, 70)
    weight[1, 69] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        packed(weight, storage)


def test_known_codes() -> None:
    """Bytes that bitsandbytes and the float8 standard write so."""
    codes = torch.full((1, 32), 0x2F, dtype=torch.uint8)
    values = widened_codes(
        Codes(storage="nf4", codes=codes, scale=torch.tensor([2.0]).bfloat16()), torch.Size((1, 64)), torch.float32
    )
    assert values[0, :2].tolist() == [pytest.approx(-1.0501461029), 2.0]
    bytes_of = torch.tensor([[0x01, 0x08, 0x38, 0x3C, 0x7E]], dtype=torch.uint8)
    eight = Codes(storage="fp8", codes=bytes_of, scale=torch.tensor([0.5]))
    assert widened_codes(eight, bytes_of.shape, torch.float32).tolist() == [[2**-10, 2**-7, 0.5, 0.75, 224.0]]
