"""Renders whose texts change from step to step, are put together, or are longer than a chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import hires
from hires.models.attention_processors import dispatch_attention
from hires.models.unet import UNetNetwork
from hires.protocols import Condition
from hires.sampling.conditioning import Conditioning, SizeCondition, of_one_length, sdxl_size_ids
from hires.sampling.guidance import Guidance, composed
from hires.tiling.geometry import Size
from tests.support.checkpoints import Checkpoint

Get = Callable[..., Checkpoint]


@pytest.fixture(scope="module")
def draw(checkpoint: Get) -> Iterator[Callable[..., NDArray[np.uint8]]]:
    made = checkpoint("sdxl")
    with hires.load(str(made.path), parts=str(made.parts), device="cpu", dtype="fp32") as engine:

        def draw(prompt: str, **options: object) -> NDArray[np.uint8]:
            common: dict[str, object] = {"size": "64x64", "steps": 4, "sampler": "euler", "guidance": 3.0}
            return engine.render(prompt, **(common | options)).pixels

        yield draw


def test_a_schedule_that_never_switches_is_the_plain_prompt(draw: Callable[..., NDArray[np.uint8]]) -> None:
    plain, other = draw("a fox"), draw("a cat")
    assert np.array_equal(draw("[a fox:a cat:4]"), plain)
    assert np.array_equal(draw("[a fox:a cat:0]"), other)
    half = draw("[a fox:a cat:0.5]")
    assert not np.array_equal(half, plain) and not np.array_equal(half, other)
    assert np.array_equal(draw("[a fox|a fox]"), plain)
    assert not np.array_equal(draw("[a fox|a cat]"), plain)


def test_and_with_weights(draw: Callable[..., NDArray[np.uint8]]) -> None:
    plain = draw("a fox")
    nothing = draw("a fox AND a cat:0").astype(int) - plain
    assert abs(nothing).max() <= 1  # of other calls of the network, which round otherwise on some processors
    twice = draw("a fox AND a fox:0.5").astype(int) - draw("a fox", guidance=4.5)
    assert abs(twice).max() <= 1  # weights of one prompt add up to its guidance
    assert not np.array_equal(draw("a fox AND a cat"), plain)


def test_weights_chunks_and_sizes_reach_the_picture(draw: Callable[..., NDArray[np.uint8]]) -> None:
    plain = draw("a fox")
    assert np.array_equal(draw("(a fox:1.0)"), plain)
    for prompt, options in (
        ("a (fox:1.4)", {}),
        ("a (fox:1.4)", {"prompt_syntax": "comfyui"}),
        ("a (fox:1.4)", {"prompt_syntax": "none"}),
        ("a BREAK fox", {}),
        ("a fox", {"prompt_l": "a cat"}),
        ("a fox", {"negative_l": "a cat"}),
        ("a fox", {"target_size": "512x256"}),
        ("a fox", {"original_size": "512x256"}),
        ("a fox", {"crop": "64,0"}),
        ("a fox", {"clip_skip": 1, "prompt_syntax": "comfyui"}),
    ):
        assert not np.array_equal(draw(prompt, **options), plain), (prompt, options)


def network(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
    return x * 0.5 + cond.tokens.mean((1, 2))[:, None, None, None]


def test_and_is_the_formula_with_at_most_two_estimates_at_once() -> None:
    """D = D_u + sum of w_i s (D_i - D_u)."""
    conds = [Conditioning(tokens=torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(i))) for i in range(4)]
    x, calls = torch.randn(1, 4, 2, 2), list[int]()

    def counted(x: Tensor, sigma: float, cond: Condition | None) -> Tensor:
        assert isinstance(cond, Conditioning)
        calls.append(len(x))
        return network(x, sigma, cond)

    *parts, uncond = conds
    weights = (1.0, 0.6, -0.3)
    found = composed(counted, [*zip(parts, weights, strict=True)], uncond, Guidance(low=4.0, high=4.0))(x, 1.0, None)
    base = network(x, 1.0, uncond)
    wanted = base + sum(w * 4.0 * (network(x, 1.0, part) - base) for part, w in zip(parts, weights, strict=True))
    assert torch.allclose(found, wanted, atol=1e-5) and calls == [2, 2]


def attended(cond: Conditioning) -> Tensor:
    """Attention of one query over the tokens, with the mask where there is one."""
    q = torch.linspace(-1, 1, cond.tokens.shape[-1])
    scores = cond.tokens @ q
    if cond.mask is not None:
        scores = scores.masked_fill(~cond.mask, -torch.inf)
    return (scores.softmax(-1)[..., None] * cond.tokens).sum(1)


@pytest.mark.parametrize("lengths", [(77, 154), (154, 231), (77 * 5, 77 * 6, 77), (77, 77)])
def test_texts_of_different_length_say_the_same_in_one_batch(lengths: tuple[int, ...]) -> None:
    conds = [Conditioning(tokens=torch.randn(1, length, 6), pooled=torch.zeros(1, 2)) for length in lengths]
    joined = conds[0].concatenate(*conds[1:])
    found = attended(joined)
    assert torch.allclose(found, torch.cat([attended(cond) for cond in conds]), atol=1e-5)
    assert joined.tokens.shape[1] <= 4 * max(lengths)
    assert of_one_length(tuple(conds[:1]))[0] is conds[0]


@pytest.mark.parametrize("chunks", [(1, 2), (5, 6)])
def test_a_network_gives_the_same_for_texts_of_different_length_in_one_batch(checkpoint: Get, chunks: tuple[int, int]) -> None:
    """Repeated, or filled up and masked."""
    made = checkpoint("sdxl")
    network = UNetNetwork(dispatch_attention(made.network, None), torch.float32)
    draw = torch.Generator().manual_seed(4)
    conds = [
        Conditioning(
            tokens=torch.randn(1, 7 * count, 128, generator=draw),
            pooled=torch.randn(1, 64, generator=draw),
            size_ids=sdxl_size_ids(Size(64, 64)),
        )
        for count in chunks
    ]
    x = torch.randn(1, 4, 8, 8, generator=draw)
    with torch.inference_mode():
        both = network(x.repeat(2, 1, 1, 1), 500.0, conds[0].concatenate(conds[1]))
        alone = torch.cat([network(x, 500.0, cond) for cond in conds])
    assert (both - alone).abs().max() < 1e-5 * alone.abs().max()
    assert (alone[0] - alone[1]).abs().max() > 1e-3 * alone.abs().max()


def test_told_sizes_take_the_place_of_the_canvas() -> None:
    told = SizeCondition(original=Size(10, 20), crop=(3, 4))
    assert sdxl_size_ids(Size(64, 96), 1, told).tolist() == [[10, 20, 4, 3, 64, 96]]
    assert sdxl_size_ids(Size(64, 96)).tolist() == [[64, 96, 0, 0, 64, 96]]
