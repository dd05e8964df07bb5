"""Self-attention of a PixArt layer, projections included: diffusers' processors beside our policies, the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Way, version_of
from hires.kernels.attention_policies import NPA, Global, KVPool, Policy, Windows

PEERS = ("diffusers AttnProcessor2_0", "diffusers enable_attention_slicing", "diffusers AttnProcessor")
POLICIES: dict[str, Policy] = {
    "hires, global": Global(), "hires, npa": NPA(128), "hires, windows": Windows(128), "hires, kvpool": KVPool(2),
}  # fmt: skip
WAYS = (*PEERS, *POLICIES)
CELLS = 2  # latent cells per side of a token


def layer(name: str, side: int, quick: bool) -> Way:
    """The layer by a processor, over the tokens of a square picture (a sixteenth of its side)."""
    from hires._imports import quiet_imports

    with quiet_imports():
        from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
    torch.manual_seed(0)
    heads = 2 if quick else 16
    attn = Attention(query_dim=72 * heads, heads=heads, dim_head=72, bias=True).eval().requires_grad_(False)
    tokens = torch.randn(1, (side // 16) ** 2, 72 * heads, generator=torch.Generator().manual_seed(0))
    package = version_of("hires" if name in POLICIES else "diffusers")
    if name in POLICIES:
        from hires.models.attention_processors import DispatchedAttention

        attn.set_processor(DispatchedAttention(cells=CELLS))
        policy = scaled(POLICIES[name], quick)
        run = partial(attn, tokens, canvas=(side // 8, side // 8), policy=policy)
        wide = not isinstance(policy, NPA | Windows) or policy.window < side // 8
        note = (
            "" if policy == Global() else f"approximation: {policy} in cells" if wide else f"{policy}: all tokens at this size"
        )
    else:
        made: dict[str, Any] = {
            PEERS[0]: AttnProcessor2_0, PEERS[1]: lambda: SlicedAttnProcessor(max(1, heads // 2)), PEERS[2]: AttnProcessor,
        }  # fmt: skip
        attn.set_processor(made[name]())
        run, note = partial(attn, tokens), "half the heads at once" if name == PEERS[1] else ""
    return Way(run=partial(called, run), facts={"version": package, "note": note}, like=PEERS[0])


def scaled(policy: Policy, quick: bool) -> Policy:
    """The policy, its window a quarter where only the code is tried."""
    return type(policy)(32) if quick and isinstance(policy, NPA | Windows) else policy


def called(run: Any) -> Tensor:
    found: Tensor = run()
    return found
