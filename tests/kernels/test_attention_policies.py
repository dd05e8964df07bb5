"""Every policy against its float64 reference, on canvases that are not square and that windows do not divide."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hires.kernels.attention_policies import NPA, Global, KVPool, Policy, Windows, attended
from hires.kernels.dispatch import AttentionSpec, attention, select, table
from hires.kernels.torch_windows import attention_masked, policy_mask


def inputs(h: int, w: int, dtype: torch.dtype = torch.float64, batch: int = 2, heads: int = 2, d: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(97 * h + w)
    return [torch.randn(batch, h * w, heads, d, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def drawn(seed: int) -> tuple[int, int, NPA | Windows]:
    chance = random.Random(seed)
    window, kind = chance.choice([4, 8, 12]), chance.choice([NPA, Windows])
    shift = (chance.randrange(12), chance.randrange(12))
    circular = (chance.random() < 0.3, chance.random() < 0.3)
    return chance.randint(1, 21), chance.randint(1, 21), kind(window, shift, circular)


@pytest.mark.parametrize("seed", range(200))
def test_windows_equal_the_masked_reference(seed: int) -> None:
    h, w, policy = drawn(seed)
    q, k, v = inputs(h, w)
    expected = attention_masked(q, k, v, (h, w), policy, 0.3)
    assert (attention(q, k, v, canvas=(h, w), policy=policy, scale=0.3) - expected).abs().max() <= 1e-12
    assert policy_mask(policy, (h, w)).sum() == attended(policy, (h, w))


@pytest.mark.parametrize("policy", [NPA(8, (1, 3)), NPA(4, (1, 0), (True, False)), Windows(5, (2, 1)), KVPool(2), KVPool(3)])
@pytest.mark.parametrize("backend", ["sdpa", "flash", "math", "chunked"])
def test_every_backend_runs_every_policy(policy: Policy, backend: str) -> None:
    q, k, v = inputs(11, 14, torch.float32)
    expected = attention_masked(q, k, v, (11, 14), policy, 8**-0.5)
    assert (attention(q, k, v, canvas=(11, 14), policy=policy, backend=backend) - expected).abs().max() <= 5e-6


def test_a_key_mask_is_gathered_with_its_keys() -> None:
    q, k, v = inputs(9, 13)
    keep = torch.rand(2, 1, 1, 117, generator=torch.Generator().manual_seed(0)) > 0.3
    policy = NPA(8, (1, 2))
    both = keep & policy_mask(policy, (9, 13))
    expected = attention(q, k, v, mask=both, backend="math")
    assert (attention(q, k, v, canvas=(9, 13), mask=keep, policy=policy) - expected).abs().max() <= 1e-12


def test_a_window_of_the_whole_canvas_is_global() -> None:
    q, k, v = inputs(12, 7, torch.float32)
    assert torch.equal(attention(q, k, v, canvas=(12, 7), policy=NPA(12, (3, 1))), attention(q, k, v))


def test_circular_windows_do_not_see_a_roll() -> None:
    q, k, v = inputs(16, 12)
    policy = NPA(8, (1, 0), (True, False))

    def rolled(x: Tensor, by: int) -> Tensor:
        return x.unflatten(2, (16, 12)).roll(by, 2).flatten(2, 3)

    moved = attention(*(rolled(x, 4) for x in (q, k, v)), canvas=(16, 12), policy=policy)
    torch.testing.assert_close(rolled(moved, -4), attention(q, k, v, canvas=(16, 12), policy=policy), rtol=0, atol=1e-12)


def test_proportional_scale_begins_beyond_the_trained_length() -> None:
    q, k, v = inputs(8, 8)
    assert torch.equal(attention(q, k, v, policy=Global(64)), attention(q, k, v))
    factor = 8**-0.5 * (torch.tensor(64.0).log() / torch.tensor(16.0).log()).sqrt().item()
    torch.testing.assert_close(attention(q, k, v, policy=Global(16)), attention(q, k, v, scale=factor), rtol=0, atol=1e-6)


@pytest.mark.parametrize("canvas", [None, (3, 5)])
def test_a_policy_without_its_canvas_says_so(canvas: tuple[int, int] | None) -> None:
    q, k, v = inputs(4, 4)
    with pytest.raises(ValueError, match="canvas"):
        attention(q, k, v, canvas=canvas, policy=NPA(4))


def test_the_default_on_a_cpu_is_torchs_own_choice_and_cuda_backends_say_why() -> None:
    spec = AttentionSpec(device="cpu", dtype=torch.float32, head_dim=64, queries=64, keys=64, masked=False)
    assert select(spec).name == "sdpa"
    assert [n for n, reason in table(spec) if reason and "cpu" in reason] == ["xformers", "triton", "efficient", "cudnn"]


@pytest.mark.slow
def test_npa_is_three_times_faster_on_a_pixart_layer() -> None:
    """The self-attention call, gather included, medians of calls that alternate; the whole layer's ratio is printed beside."""
    from benchmarks.suites.attention import layer_ratio

    ratios = layer_ratio()
    print(ratios)
    assert ratios["attention"] >= 3
    assert ratios["layer"] > 1.5
