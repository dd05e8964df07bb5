"""The PixArt adapter: equal to diffusers where diffusers can go, right about places where it cannot."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hires.checkpoints.families import second_half_factors
from hires.models.attention_processors import add_compression
from hires.models.pixart import PixArtNetwork, PlacedPatches, axis_embedding, padded_text, positions
from hires.sampling.conditioning import Conditioning, pixart_resolution
from hires.tiling.denoise import tiled
from hires.tiling.geometry import Box, Size, make_grid
from tests.support.tiny_pixart import CAPTION, HEAD_DIM, HEADS, LAYERS, latents, prompt, transformer

WIDTH = HEADS * HEAD_DIM


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def upstream(model: torch.nn.Module, x: Tensor, time: float, cond: Conditioning) -> Tensor:
    """diffusers' own forward, learned variance dropped."""
    sizes = {"resolution": None, "aspect_ratio": None}
    if cond.resolution is not None:
        sizes = {"resolution": cond.resolution, "aspect_ratio": cond.resolution[:, :1] / cond.resolution[:, 1:]}  # type: ignore[dict-item]
    output: Tensor = model(
        x, cond.tokens, torch.full((len(x),), time), sizes, encoder_attention_mask=cond.mask, return_dict=False
    )[0]
    return output[:, :4]


@pytest.mark.parametrize(
    ("sample_size", "interpolation", "span"), [(32, 0.5, 32.0), (32, 1, 16.0), (64, 1, 32.0), (128, 2, 32.0)]
)
def test_the_native_forward_is_upstreams_bit_for_bit(sample_size: int, interpolation: float, span: float) -> None:
    """Σ-256, α-256, Σ-512 and Σ-1024 with a text whose length needs no padding."""
    canvas = Size(sample_size, sample_size)
    model, x, cond = transformer(sample_size, interpolation), latents(sample_size, sample_size), prompt(7, 120, 1, canvas)
    expected = upstream(copy.deepcopy(model), x, 437, cond)
    network = PixArtNetwork(model, span=span)
    assert torch.equal(network(x, 437, cond), expected)
    assert not torch.equal(PixArtNetwork(model, span=span * 1.01)(x, 437, cond), expected)


def test_other_sizes_and_a_padded_text_are_upstreams_to_rounding() -> None:
    """300 tokens go to 304; 80 x 48 cells are not native, where diffusers computes positions in float32."""
    model, x, cond = transformer(64, 1), latents(80, 48), prompt(40, 300, 2, Size(80, 48))
    expected = upstream(copy.deepcopy(model), x, 12, cond)
    assert (PixArtNetwork(model, span=32.0)(x, 12, cond) - expected).abs().max() < 1e-5


def test_padding_the_text_changes_nothing() -> None:
    model, x, cond = (
        transformer(32, 0.5),
        latents(32, 32, 2),
        Conditioning.concatenate(*(prompt(5, 300, s, Size(32, 32)) for s in (3, 4))),
    )
    tokens, bias = padded_text(cond.tokens, cond.mask)
    assert tokens.shape == (2, 304, CAPTION) and bias is not None and bias.shape == (2, 1, 304)
    expected = upstream(copy.deepcopy(model), x, 700, cond)
    found = PixArtNetwork(model, span=32.0)(x, 700, cond)
    assert (found - expected).abs().max() < 1e-6
    unmasked = Conditioning(tokens=cond.tokens, canvas=cond.canvas)  # no mask: all 300 count, the four of the padding do not
    assert (PixArtNetwork(model, span=32.0)(x, 700, unmasked) - found).abs().max() > 1e-3
    short = padded_text(cond.tokens[:, :8], None)
    assert short[0].shape[1] == 8 and short[1] is None


def test_size_conditions_are_the_resolution_and_its_aspect() -> None:
    model, x = transformer(32, 0.5, sized=True), latents(24, 32, 2)
    cond = Conditioning.concatenate(*(prompt(5, 120, s, Size(24, 32)) for s in (3, 4)))
    sized = Conditioning(
        tokens=cond.tokens, mask=cond.mask, canvas=cond.canvas, resolution=pixart_resolution(Size(192, 256), 2)
    )
    expected = upstream(copy.deepcopy(model), x, 700, sized)
    network = PixArtNetwork(model, span=32.0)
    assert (network(x, 700, sized) - expected).abs().max() < 1e-5
    other = Conditioning(
        tokens=cond.tokens, mask=cond.mask, canvas=cond.canvas, resolution=pixart_resolution(Size(256, 192), 2)
    )
    assert (network(x, 700, other) - expected).abs().max() > 1e-4


def test_time_may_lie_between_two_steps_of_the_table() -> None:
    network, x, cond = PixArtNetwork(transformer(32, 0.5), span=32.0), latents(32, 32), prompt(5, 120, 1, Size(32, 32))
    low, mid, high = (network(x, time, cond) for time in (500.0, 500.5, 501.0))
    assert (low - high).abs().max() > 1e-5
    torch.testing.assert_close(mid, (low + high) / 2, rtol=0, atol=float((low - high).abs().max()) / 4)


def closed_form(grid: Size, span: float, width: int) -> np.ndarray:
    """The embedding of every patch from the papers' formula: columns first, sine before cosine; (rows, cols, width)."""
    quarter = width // 4
    rates = np.array([10000.0 ** (-k / quarter) for k in range(quarter)])
    parts = []
    for index in (1, 0):
        place = np.indices((grid.height, grid.width))[index] * span / (grid.width if index else grid.height)
        parts += [np.sin(place[..., None] * rates), np.cos(place[..., None] * rates)]
    return np.concatenate(parts, axis=-1)


def embedding(boxes: list[Box], canvas: Size, span: float, share: float, width: int = WIDTH) -> Tensor:
    """What the adapter adds to patches of zero, (B, rows, cols, width)."""
    proj = torch.nn.Conv2d(4, width, 2, 2)
    torch.nn.init.zeros_(proj.bias)
    places = positions(boxes, canvas, span, share, torch.device("cpu"))
    zero = torch.zeros(len(boxes), 4, boxes[0].height, boxes[0].width)
    return PlacedPatches(proj)(torch.cat([zero, places], dim=1)).unflatten(1, (boxes[0].height // 2, boxes[0].width // 2))


@pytest.mark.parametrize("grid", [Size(32, 32), Size(40, 24), Size(135, 240)])
@pytest.mark.parametrize("span", [32.0, 16.0])
def test_positions_are_the_closed_form_and_upstreams(grid: Size, span: float) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    canvas = grid.times(2)
    found = embedding([Box(0, 0, canvas.height, canvas.width)], canvas, span, 1.0)[0].numpy()
    assert np.abs(found - closed_form(grid, span, WIDTH)).max() < 1e-6
    theirs = get_2d_sincos_pos_embed(WIDTH, (grid.height, grid.width), base_size=int(2 * span), interpolation_scale=2)
    assert np.abs(found.reshape(-1, WIDTH) - theirs.numpy()).max() < 4e-6  # their positions are float32 up to 64
    assert np.abs(found - closed_form(grid, span * 1.001, WIDTH)).max() > 1e-3


def test_a_tiles_embedding_is_a_slice_of_the_canvass() -> None:
    canvas = Size(270, 480)
    whole = embedding([Box(0, 0, 270, 480)], canvas, 32.0, 1.0)[0]
    boxes = [Box(0, 0, 64, 64), Box(206, 416, 64, 64), Box(100, 32, 64, 64)]
    tiles = embedding(boxes, canvas, 32.0, 1.0)
    for tile, box in zip(tiles, boxes, strict=True):
        assert torch.equal(tile, whole[box.top // 2 : box.bottom // 2, box.left // 2 : box.right // 2])
    between = embedding([Box(1, 0, 64, 64)], canvas, 32.0, 1.0)[0]  # a shifted grid starts at odd cells: half a patch on
    half = axis_embedding(torch.tensor([[1 * 32.0 / 270]]), WIDTH // 2)[0, 0]
    torch.testing.assert_close(between[0, 0, WIDTH // 2 :], half, rtol=0, atol=1e-6)


def test_local_takes_a_tile_for_a_picture_and_blend_lies_between() -> None:
    canvas, box = Size(128, 96), Box(64, 32, 32, 48)
    local = embedding([box], canvas, 32.0, 0.0)
    assert torch.equal(local, embedding([Box(0, 0, 32, 48)], Size(32, 48), 32.0, 1.0))
    places = [positions([box], canvas, 32.0, share, torch.device("cpu")) for share in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(places[1], places[0] * 0.75 + places[2] * 0.25)
    assert places[2][0, 0, 0, 0] == 16.0 and places[0][0, 0, 0, 0] == 0.0


def test_tiles_of_different_places_go_in_one_batch() -> None:
    canvas = Size(96, 64)
    network, cond = PixArtNetwork(transformer(32, 0.5), span=32.0), prompt(5, 120, 1, canvas)
    boxes = [Box(0, 0, 32, 32), Box(64, 32, 32, 32), Box(31, 7, 32, 32)]
    x = latents(32, 32, 3)
    together = network(x, 300, Conditioning.concatenate(*(cond.crop(box) for box in boxes)))
    for index, box in enumerate(boxes):
        torch.testing.assert_close(
            together[index : index + 1], network(x[index : index + 1], 300, cond.crop(box)), rtol=0, atol=2e-6
        )
    swapped = network(x, 300, Conditioning.concatenate(*(cond.crop(box) for box in reversed(boxes))))
    assert (swapped[0] - together[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("share", "same"), [(1.0, True), (0.0, False)])
def test_a_network_that_looks_at_one_patch_only_is_the_same_tiled_and_whole(share: float, same: bool) -> None:
    """Law 2 with places: without attention all that a patch knows is itself and where it lies."""
    model, canvas = transformer(32, 0.5), Size(48, 64)
    for block in model.transformer_blocks:
        for attn in (block.attn1, block.attn2):
            torch.nn.init.zeros_(attn.to_out[0].weight)
    network = PixArtNetwork(model, span=32.0, global_share=share)
    x, cond = latents(48, 64), prompt(5, 120, 1, canvas)
    fused = tiled(lambda x, sigma, cond: network(x, sigma, cond), make_grid(canvas, Size(32, 32), 16), batch=4)(x, 300, cond)
    difference = (fused - network(x, 300, cond)).abs().max()
    assert difference < 1e-5 if same else difference > 1e-2


def test_what_a_tile_knows_moves_with_it() -> None:
    cond = prompt(5, 16, 1, Size(100, 80))
    cond = Conditioning(tokens=cond.tokens, canvas=cond.canvas, resolution=pixart_resolution(Size(800, 640)))
    assert cond.boxes == (Box(0, 0, 100, 80),)
    tile = cond.crop(Box(10, 20, 60, 40))
    assert tile.boxes == (Box(10, 20, 60, 40),) and tile.canvas == Size(100, 80)
    assert tile.resolution is not None and tile.resolution.tolist() == [[480, 320]]
    inner = tile.concatenate(cond.crop(Box(0, 0, 60, 40))).crop(Box(5, 6, 16, 8))
    assert inner.boxes == (Box(15, 26, 16, 8), Box(5, 6, 16, 8))
    assert inner.resolution is not None and inner.resolution.tolist() == [[128, 64], [128, 64]]
    assert cond.resolution is not None and cond.resolution.tolist() == [[800, 640]]
    with pytest.raises(AssertionError, match="canvases"):
        cond.concatenate(prompt(5, 16, 1, Size(10, 10)))


def attention_by_hand(attn: torch.nn.Module, x: Tensor, grid: tuple[int, int], factor: int, learned: bool) -> Tensor:
    """Self-attention with thinned keys and values, one sum after the other in float64; x (1, N, C)."""
    weights = {name: value.double() for name, value in attn.state_dict().items()}
    x = x.double()[0]
    q, k, v = (x @ weights[f"to_{n}.weight"].T + weights[f"to_{n}.bias"] for n in "qkv")

    def thin(tokens: Tensor) -> Tensor:
        cells = tokens.reshape(*grid, WIDTH)
        down, across = (-side % factor for side in grid)
        cells = torch.cat([cells, *[cells[-1:]] * down])
        cells = torch.cat([cells, *[cells[:, -1:]] * across], dim=1)
        rows = []
        for i, j in itertools.product(range(len(cells) // factor), range(cells.shape[1] // factor)):
            block = cells[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
            if not learned:
                rows.append(block.mean((0, 1)))
                continue
            one = sum(block[a, b] * weights["sr.weight"][:, 0, a, b] for a in range(factor) for b in range(factor))
            one = one + weights["sr.bias"]
            one = (one - one.mean()) / (one.var(unbiased=False) + 1e-5).sqrt()
            rows.append(one * weights["norm.weight"] + weights["norm.bias"])
        return torch.stack(rows)

    k, v = (thin(k), thin(v)) if factor > 1 else (k, v)
    heads = []
    for h in range(HEADS):
        part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / HEAD_DIM**0.5, dim=-1) @ v[:, part])
    return torch.cat(heads, dim=-1) @ weights["to_out.0.weight"].T + weights["to_out.0.bias"]


@pytest.mark.parametrize("grid", [(12, 20), (13, 21), (20, 13)])
@pytest.mark.parametrize(("factor", "learned"), [(1, False), (2, False), (2, True), (4, True)])
def test_thinned_attention_is_the_sum_by_hand(factor: int, learned: bool, grid: tuple[int, int]) -> None:
    """On grids that the factor divides, and on others, whose last row and column are repeated."""
    model = transformer(32, 0.5)
    if learned:
        add_compression(model, (1, factor), {})
    attn = model.transformer_blocks[1].attn1
    for value in attn.parameters():
        torch.nn.init.normal_(value, std=0.4)
    PixArtNetwork(model, span=32.0, thin=(1, factor))
    x = torch.randn(1, grid[0] * grid[1], WIDTH, generator=torch.Generator().manual_seed(5))
    found = attn(x, canvas=(2 * grid[0], 2 * grid[1]))[0]
    assert (found - attention_by_hand(attn, x, grid, factor, learned)).abs().max() < 2e-5
    if factor > 1:
        assert (found - attention_by_hand(attn, x, grid, 1, learned)).abs().max() > 1e-2


def test_compression_goes_through_the_whole_network() -> None:
    model, x, cond = transformer(32, 0.5), latents(24, 40), prompt(5, 120, 1, Size(24, 40))
    dense = PixArtNetwork(copy.deepcopy(model), span=32.0)(x, 300, cond)
    assert torch.equal(PixArtNetwork(copy.deepcopy(model), span=32.0, thin=(1, 1))(x, 300, cond), dense)
    thin = PixArtNetwork(copy.deepcopy(model), span=32.0, thin=second_half_factors(LAYERS))
    assert (thin(x, 300, cond) - dense).abs().max() > 1e-5
    flat = latents(2, 2).repeat(1, 1, 12, 20)  # where all patches are alike, so are all keys, but for where they lie
    local = PixArtNetwork(model, span=1e-9, thin=second_half_factors(LAYERS))
    assert (local(flat, 300, cond) - PixArtNetwork(model, span=1e-9)(flat, 300, cond)).abs().max() < 1e-5


def test_the_weights_of_compression_have_the_checkpoints_names_and_begin_as_the_mean() -> None:
    model = transformer(32, 0.5)
    before = set(model.state_dict())
    add_compression(model, (1, 2), {})
    added = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in before}
    attn = "transformer_blocks.1.attn1"
    assert added == {
        f"{attn}.sr.weight": (WIDTH, 1, 2, 2), f"{attn}.sr.bias": (WIDTH,),
        f"{attn}.norm.weight": (WIDTH,), f"{attn}.norm.bias": (WIDTH,),
    }  # fmt: skip
    assert model.state_dict()[f"{attn}.sr.weight"].unique().tolist() == [0.25]
    assert second_half_factors(28) == (1,) * 14 + (2,) * 14
    PixArtNetwork(model, span=32.0, thin=(1, 2))
    assert set(model.state_dict()) == before | set(added)  # replacing parts moves no weight


def test_a_checkpoints_compression_is_taken_over_in_its_dtype() -> None:
    model = transformer(32, 0.5).to(torch.bfloat16)
    given = {"sr.weight": (WIDTH, 1, 2, 2), "sr.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    file = {name: torch.full(shape, 0.5 + index) for index, (name, shape) in enumerate(given.items())}
    add_compression(model, (2, 2), {1: file})
    state = model.state_dict()
    for name, value in file.items():
        found = state[f"transformer_blocks.1.attn1.{name}"]
        assert found.dtype == torch.bfloat16 and torch.equal(found.float(), value)
        assert not torch.equal(state[f"transformer_blocks.0.attn1.{name}"].float(), value)
    found = PixArtNetwork(model, span=32.0, thin=(2, 2))(
        latents(8, 12), 300, prompt(5, 300, 1, Size(8, 12)).to("cpu", torch.bfloat16)
    )
    assert found.dtype == torch.bfloat16 and bool(found.isfinite().all())
