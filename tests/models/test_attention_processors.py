"""Every policy and backend in the networks themselves: a tiny UNet and PixArt against an attention written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hires.errors import BackendError
from hires.kernels.attention_policies import NPA, Global, KVPool, Policy, Windows, axis
from hires.kernels.dispatch import BACKENDS, spec_of
from hires.models.attention_processors import dispatch_attention
from hires.models.pixart import PixArtNetwork
from hires.models.unet import UNetNetwork
from hires.pipelines.progressive import attending
from hires.sampling.conditioning import Conditioning
from hires.tiling.denoise import seeded_shift
from hires.tiling.geometry import Size
from tests.support import tiny_pixart

SIDES = 21, 34  # neither square nor a multiple of a window; its second level has an odd side
POLICIES: tuple[Policy, ...] = (
    NPA(16),
    NPA(16, (5, 3)),
    NPA(16, (0, 4), (False, True)),
    Windows(8),
    Windows(12, (2, 4)),
    KVPool(2),
    KVPool(3),
    Global(trained=100),
    Global(),
)
Network = Callable[[Tensor, float, Any], Tensor]


def tokens_seen(policy: NPA | Windows, canvas: tuple[int, int]) -> Tensor:
    """(N, N): for each axis, block a = (i + shift) // block of a token sees `keys` tokens from the block's clamped start."""
    seen = []
    for which, length in enumerate(canvas):
        along = axis(policy, length, which)
        keep = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            moved = (i + along.shift) % length if along.circular else i + along.shift
            start = along.key_start(moved // along.block)
            keep[i, [(start + n) % length for n in range(along.keys)]] = True
        seen.append(keep)
    return torch.einsum("ik,jl->ijkl", *(x.double() for x in seen)).reshape(canvas[0] * canvas[1], -1).bool()


class Written:
    """An attention processor in float64, all scores at once."""

    def __init__(self, policy: Policy, cells: int) -> None:
        self.policy, self.cells = policy, cells

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, canvas: Any = None, policy: Any = None,
    ) -> Tensor:  # fmt: skip
        own = encoder_hidden_states is None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states).double(), attn.to_k(context).double(), attn.to_v(context).double()
        scale, grid = attn.scale, tuple(-(-side // self.cells) for side in SIDES)
        if own and isinstance(self.policy, KVPool):
            k, v = (mean_of(x, grid, self.policy.r) for x in (k, v))
        if own and isinstance(self.policy, Global) and self.policy.trained is not None:
            scale *= (math.log(grid[0] * grid[1]) / math.log(self.policy.trained // self.cells**2)) ** 0.5
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if attention_mask is not None:
            scores = scores + attention_mask.reshape(q.shape[0], -1, *attention_mask.shape[1:]).double()
        if own and isinstance(self.policy, NPA | Windows):
            side = self.policy.window // self.cells
            assert side * self.cells == self.policy.window, "the test's windows are whole tokens"
            small = replace(self.policy, window=side, shift=tuple(s // self.cells for s in self.policy.shift))
            scores = scores.masked_fill(~tokens_seen(small, grid), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed.to(hidden_states.dtype))


def mean_of(x: Tensor, grid: tuple[int, ...], r: int) -> Tensor:
    """Means over r x r tokens, the last row and column repeated where r does not divide the grid."""
    rows, cols = ([min(i, n - 1) for i in range(-(-n // r) * r)] for n in grid)
    maps = x.unflatten(1, grid)[:, rows][:, :, cols]
    return maps.unflatten(1, (-1, r)).unflatten(3, (-1, r)).mean((2, 4)).flatten(1, 2)


def unet(backend: str | None = None, written: Policy | None = None) -> tuple[Network, Tensor, Conditioning]:
    """Three levels, attention on the two lower ones as SDXL has it."""
    torch.manual_seed(3)
    module = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4, 4),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=24,
        transformer_layers_per_block=(1, 1, 2),
    ).eval()  # fmt: skip
    dispatch_attention(module, backend)
    if written is not None:
        module.set_attn_processor({name: Written(written, p.cells) for name, p in module.attn_processors.items()})
    cond = Conditioning(tokens=torch.randn(2, 7, 24), mask=None)
    return UNetNetwork(module, torch.float32), torch.randn(2, 4, *SIDES), cond


def pixart(backend: str | None = None, written: Policy | None = None) -> tuple[Network, Tensor, Conditioning]:
    module = tiny_pixart.transformer(16, 0.5, seed=4)
    canvas = Size(SIDES[0] + 1, SIDES[1])
    network = PixArtNetwork(module, span=32.0, backend=backend)
    if written is not None:
        module.set_attn_processor({name: Written(written, 2) for name in module.attn_processors})
    cond = tiny_pixart.prompt(5, 9, 1, canvas)
    return network, tiny_pixart.latents(*(canvas.height, canvas.width)), cond


MODELS = {"unet": unet, "pixart": pixart}


@pytest.fixture(scope="module")
def expected() -> Callable[[str, Policy], Tensor]:
    kept: dict[tuple[str, Policy], Tensor] = {}

    def get(model: str, policy: Policy) -> Tensor:
        if (model, policy) not in kept:
            network, x, cond = MODELS[model](written=policy)
            with torch.inference_mode():
                kept[model, policy] = network(x, 100.0, cond)
        return kept[model, policy]

    return get


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("backend", [None, *(b.name for b in BACKENDS)])
def test_every_backend_and_policy_gives_the_written_out_result(
    model: str, policy: Policy, backend: str | None, expected: Callable[[str, Policy], Tensor]
) -> None:
    """Or the reason that `why_not` names; and another policy gives another result, so that the policy arrived."""
    network, x, cond = MODELS[model](backend)
    with torch.inference_mode():
        refused = next((b for b in BACKENDS if b.name == backend and b.why_not(spec_of(x, x, x, None)) is not None), None)
        if refused is not None:
            with pytest.raises(BackendError, match=refused.name):
                network.attending(lambda time: policy)(x, 100.0, cond)
            return
        found = network.attending(lambda time: policy)(x, 100.0, cond)
    assert (found - expected(model, policy)).abs().max() <= 2e-5 * found.abs().max()
    if policy != Global():
        assert (found - expected(model, Global())).abs().max() > 1e-4 * found.abs().max()


@pytest.mark.parametrize("model", MODELS)
def test_a_window_of_the_canvas_is_global_in_the_network(model: str) -> None:
    network, x, cond = MODELS[model]()
    with torch.inference_mode():
        assert torch.equal(network.attending(lambda time: NPA(40, (3, 7)))(x, 1.0, cond), network(x, 1.0, cond))


def test_a_stages_shift_moves_the_blocks_by_the_noise_level() -> None:
    shift = seeded_shift(1, 2, 8)
    policy = attending(NPA(32), shift)
    assert policy(0.5) == NPA(32, shift(0.5)) != policy(0.6)
    assert attending(NPA(32), None)(0.5) == NPA(32)
    assert attending(KVPool(2), shift)(0.5) == KVPool(2)


@pytest.mark.parametrize(("policy", "cells", "tokens"), [
    (NPA(128), 2, NPA(64)), (NPA(128), 4, NPA(32)), (NPA(128, (6, 9)), 2, NPA(64, (3, 4))), (NPA(20), 8, NPA(4)),
    (Windows(96), 4, Windows(24)), (KVPool(2), 4, KVPool(2)), (Global(), 2, Global()), (Global(16384), 2, Global(4096)),
])  # fmt: skip
def test_windows_follow_the_training_length_of_a_level(policy: Policy, cells: int, tokens: Policy) -> None:
    assert policy.per(cells) == tokens
