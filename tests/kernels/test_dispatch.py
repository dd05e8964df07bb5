from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from hires.kernels.backends import BackendRefused
from hires.kernels.dispatch import BACKENDS, AttentionSpec, attention, select, spec_of, table
from hires.kernels.reference import attention_chunked


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """float64, all scores at once."""
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v.double()


def case(n: int, m: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 7 + m)
    q, k, v = (torch.randn(2, 3, length, d, generator=generator).to(dtype) for length in (n, m, m))
    return q, k, v


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS])
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 8), (17, 33, 40), (64, 77, 72), (5, 2100, 64), (130, 13, 512)])
@pytest.mark.parametrize("masked", [None, "bool", "additive"])
def test_every_backend_gives_the_reference_result(backend: str, n: int, m: int, d: int, masked: str | None) -> None:
    q, k, v = case(n, m, d, torch.float32)
    mask = None
    if masked is not None:
        keep = torch.rand(2, 1, 1, m, generator=torch.Generator().manual_seed(m)) > 0.3
        keep[..., 0] = True
        mask = keep if masked == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -1e4)
    expected = plain(q, k, v, mask, d**-0.5)
    reason = dict(table(spec_of(q, k, v, mask)))[backend]
    if reason is not None:
        with pytest.raises(BackendRefused, match=re.escape(reason)):
            attention(q, k, v, mask=mask, backend=backend)
        return
    assert (attention(q, k, v, mask=mask, backend=backend) - expected).abs().max() <= 5e-6


def test_the_reference_is_exact_in_double_for_any_chunk() -> None:
    q, k, v = case(9, 50, 16, torch.float64)
    for chunk in (1, 7, 50, 64):
        torch.testing.assert_close(attention_chunked(q, k, v, None, 0.3, chunk), plain(q, k, v, None, 0.3), rtol=0, atol=1e-12)


def test_half_precision_is_at_most_twice_torchs_error() -> None:
    q, k, v = case(40, 600, 64, torch.bfloat16)
    expected = plain(q, k, v, None, 0.125)
    errors = [(attention(q, k, v, backend=name).double() - expected).abs().max() for name in ("chunked", "sdpa")]
    assert errors[0] <= 2 * errors[1]


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32)
MASKS = (None, "by key", "by query", "additive")


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_why_not_agrees_with_what_runs(backend: str, dtype: torch.dtype, strided: bool) -> None:
    """Every head size, mask and length, alone and crossed: the right result, or the reason and nothing else."""
    device, ran, refused = "cuda" if torch.cuda.is_available() else "cpu", 0, 0
    bar = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(dtype, 1e-5)
    for d, (n, m), masked in itertools.product((8, 40, 64, 72, 80, 97, 128, 160, 512), ((1, 1), (3, 17), (9, 9)), MASKS):
        q, k, v = (x.to(device, dtype) for x in case(n, m, d, torch.float32))
        if strided:
            q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v))
        keep = torch.rand(2, 1, n if masked == "by query" else 1, m, generator=torch.Generator().manual_seed(m)) > 0.4
        keep[..., 0] = True
        bias = torch.zeros(keep.shape).masked_fill(~keep, -100.0).to(dtype)
        mask = None if masked is None else (bias if masked == "additive" else keep).to(device)
        reason = dict(table(spec_of(q, k, v, mask)))[backend]
        if reason is not None:
            refused += 1
            with pytest.raises(BackendRefused, match=re.escape(reason)):
                attention(q, k, v, mask=mask, backend=backend)
            continue
        ran += 1
        found = attention(q, k, v, mask=mask, backend=backend)
        assert found.dtype == dtype and found.shape == q.shape
        assert (found.double() - plain(q, k, v, mask, d**-0.5)).abs().max() <= bar, (d, n, m, masked)
    assert ran + refused == 108
    assert ran > 0 or dtype == torch.int32 or backend not in ("sdpa", "math", "chunked")


def test_the_first_that_runs_is_taken_and_a_named_one_is_never_replaced() -> None:
    spec = AttentionSpec(device="cpu", dtype=torch.float32, head_dim=64, queries=10**6, keys=10**6, masked=True)
    assert select(spec).name == "chunked"
    with pytest.raises(BackendRefused, match="sdpa: a masked call of 1000000 x 1000000 would hold all scores"):
        select(spec, "sdpa")
    with pytest.raises(BackendRefused, match="known: sdpa, xformers, triton"):
        select(spec, "flash9")


def test_strided_heads_are_refused_by_the_fused_kernels_and_run_by_the_rest() -> None:
    q, k, v = (x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in case(6, 9, 8, torch.float32))
    for name, reason in table(spec_of(q, k, v, None)):
        if reason is None:
            assert (attention(q, k, v, backend=name) - plain(q, k, v, None, 8**-0.5)).abs().max() <= 5e-6
    with pytest.raises(BackendRefused, match="side by side"):
        attention(q, k, v, backend="flash")
