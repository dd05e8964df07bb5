"""Each kind of change against its formula written out in float64, on linear layers and convolutions; stacks in any order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hires.checkpoints.adapters.stated import Stated
from hires.errors import ModelError
from hires.models.adapters.change import Change
from hires.models.adapters.lora import FORMULAS, merged

Rows = Sequence[Any]
W3 = [[1.0, 2.0], [3.0, 4.0]]
ROTATION = {"oft_blocks": [[[0.0, 0.5], [0.0, 0.0]]]}
LOW = {"up": [[1.0], [2.0]], "down": [[3.0, -1.0]], "alpha": 0.5}
DORA = {"up": [[1.0], [2.0]], "down": [[1.5, -0.5]]}
FACTORS = {"lokr_w1": [[1.0, 2.0], [0.0, -1.0]], "lokr_w2_a": [[1.0], [3.0]], "lokr_w2_b": [[2.0, 1.0]], "alpha": 0.5}
KERNELS = [[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 6.0], [7.0, 8.0]]]]
"""(2, 1, 2, 2)."""
HADAMARD = {"hada_w1_a": [[1.0], [2.0]], "hada_w1_b": [[1.0, 3.0]], "hada_w2_a": [[2.0], [-1.0]], "hada_w2_b": [[1.0, 0.5]]}
TUCKER = {"hada_t1": [[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]], "hada_w1_a": W3, "hada_w1_b": [[1.0, 0.0], [1.0, 1.0]]}
ONES = {"hada_t2": [[[[1.0]]]], "hada_w2_a": [[1.0, 1.0]], "hada_w2_b": [[1.0, 1.0]]}
GLORA = {"a1": [[1.0], [0.0]], "a2": [[0.5, 1.0]], "b1": [[1.0], [2.0]], "b2": [[1.0, -1.0]]}
HALF_TURN, NONE = [[0.0, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]


def change(kind: str, factors: Mapping[str, Any], scale: float = 1.0, stated: Stated | None = None, **options: Any) -> Change:
    tensors = {role: torch.as_tensor(value, dtype=torch.float64) for role, value in factors.items()}
    return Change(where="f: layer", kind=kind, tensors=tensors, scale=scale, stated=stated or Stated(), **options)


def f64(values: Rows) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


FIXTURES: dict[str, tuple[str, Rows, Mapping[str, Any], float, Rows]] = {
    "lora": ("lora", W3, LOW, 0.8, [[2.2, 1.6], [5.4, 3.2]]),
    "locon mid": (
        "lora", [[[[0.0]], [[0.0]]]] * 2,
        {"up": [[1.0, 2.0], [0.0, 1.0]], "down": [[1.0, 1.0], [2.0, 0.0]], "mid": [[[[1.0]], [[2.0]]], [[[3.0]], [[4.0]]]]},
        1.0, [[[[27.0]], [[7.0]]], [[[11.0]], [[3.0]]]],
    ),
    "dora in": (
        "lora", W3, DORA | {"dora_scale": [[2.0, 5.0]]}, 1.0, [[0.7692307692, 2.2360679775], [1.8461538462, 4.4721359550]],
    ),
    "dora in, half": (
        "lora", W3, DORA | {"dora_scale": [[2.0, 5.0]]}, 0.5, [[0.8846153846, 2.1180339887], [2.4230769231, 4.2360679775]],
    ),
    "dora out": (
        "lora", W3, DORA | {"dora_scale": [[2.0], [6.0]]}, 1.0, [[1.7149858514, 1.0289915109], [5.3665631460, 2.6832815730]],
    ),
    "dora out, half": (
        "lora", W3, DORA | {"dora_scale": [[2.0], [6.0]]}, 0.5, [[1.3574929257, 1.5144957554], [4.1832815730, 3.3416407865]],
    ),
    "dora of peft, half": (
        "lora", W3, DORA | {"magnitude": [2.0, 6.0]}, 0.5, [[1.4142135624, 1.4142135624], [4.7361133043, 3.6836436811]],
    ),
    "lokr": (
        "lokr", [[0.0] * 4] * 4, FACTORS, 1.0,
        [[1.0, 0.5, 2.0, 1.0], [3.0, 1.5, 6.0, 3.0], [0.0, 0.0, -1.0, -0.5], [0.0, 0.0, -3.0, -1.5]],
    ),
    "loha": ("loha", [[0.0, 0.0]] * 2, HADAMARD, 1.0, [[2.0, 3.0], [-2.0, -3.0]]),
    "loha tucker": ("loha", [[[[0.0]], [[0.0]]]] * 2, TUCKER | ONES, 1.0, [[[[24.0]], [[14.0]]], [[[34.0]], [[20.0]]]]),
    "oft": ("oft", W3, ROTATION, 1.0, [[-1.8, -2.0], [2.6, 4.0]]),
    "oft, half": ("oft", W3, ROTATION, 0.5, [[-0.4, 0.0], [2.8, 4.0]]),
    "oft, bound": (
        "oft", [[1.0, 0.0], [0.0, 1.0]], ROTATION | {"alpha": 0.1}, 1.0,
        [[0.9607843137, -0.2772967769], [0.2772967769, 0.9607843137]],
    ),
    "oft_diag": ("oft", W3, {"oft_diag": [[[0.6, 0.8], [-0.8, 0.6]]]}, 1.0, [[-1.8, -2.0], [2.6, 4.0]]),
    "boft": (
        "oft", torch.eye(4).tolist(), {"oft_blocks": [[HALF_TURN, NONE], [NONE, HALF_TURN]]}, 1.0,
        [[0.6, 0.8, 0.0, 0.0], [-0.48, 0.36, 0.0, 0.8], [0.0, 0.0, 1.0, 0.0], [0.64, -0.48, 0.0, 0.6]],
    ),
    "oft of peft": (
        "peft_oft", [[1.0, 0.0], [0.0, 1.0]], {"oft_R": [[0.5]]}, 1.0, [[0.5625, -0.75], [0.75, 0.5625]],
    ),
    "glora": ("glora", W3, GLORA, 1.0, [[2.5, 2.0], [6.5, 5.0]]),
    "ia3 out": ("ia3", W3, {"weight": [0.1, -0.2], "on_input": 0}, 1.0, [[1.1, 2.2], [2.4, 3.2]]),
    "ia3 in": ("ia3", W3, {"weight": [0.1, -0.2], "on_input": 1}, 1.0, [[1.1, 1.6], [3.3, 3.2]]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXTURES)
def test_small_numbers_worked_out_by_hand(name: str) -> None:
    kind, weight, factors, scale, wanted = FIXTURES[name]
    assert (merged(f64(weight), [change(kind, factors, scale)]) - f64(wanted)).abs().max() < 5e-10


def test_two_whole_factors_of_a_convolution_take_no_alpha() -> None:
    factors = {"lokr_w1": [[1.0, 2.0], [0.0, -1.0]], "lokr_w2": KERNELS, "alpha": 1e10}
    got = merged(torch.zeros(4, 2, 2, 2, dtype=torch.float64), [change("lokr", factors)])
    assert got[0].tolist() == [[[1, 2], [3, 4]], [[2, 4], [6, 8]]]
    assert got[3].tolist() == [[[0, 0], [0, 0]], [[-5, -6], [-7, -8]]]
    of_peft = change("lokr", factors, stated=Stated(alpha=4.0, rank=8, peft=True))
    assert torch.equal(merged(torch.zeros_like(got), [of_peft]), got / 2), "peft scales it by its stated alpha / r"


def test_the_exact_rotation_of_peft() -> None:
    got = merged(f64([[1.0, 0.0], [0.0, 1.0]]), [change("peft_oft", {"oft_R": [[0.5]]}, stated=Stated(neumann_terms=0))])
    assert (got - f64([[0.6, 0.8], [-0.8, 0.6]])).abs().max() < 1e-12, "diag(R)^T of R = [[.6, -.8], [.8, .6]]"


# --- written out, element by element or by other means than the code's ---------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def product(rank: int, shape: tuple[int, ...], seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Factors of a LoRA for a weight, and U D summed out."""
    up, down = drawn(shape[0], rank, *[1] * (len(shape) - 2), seed=seed), drawn(rank, *shape[1:], seed=seed + 1)
    total = sum(up.flatten(1)[:, k].view(-1, *[1] * (len(shape) - 1)) * down[k] for k in range(rank))
    assert isinstance(total, Tensor)
    return {"up": up, "down": down}, total


def hadamard(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    flat = (shape[0], torch.Size(shape[1:]).numel())
    (one, first), (two, second) = product(3, flat), product(3, flat, 9)
    names = {"hada_w1_a": one["up"], "hada_w1_b": one["down"], "hada_w2_a": two["up"], "hada_w2_b": two["down"]}
    return names, (first * second).reshape(shape)


def kronecker(shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    one, two = drawn(2, 2), drawn(shape[0] // 2, shape[1] // 2, *shape[2:])
    blocks = [torch.cat([one[i, j] * two for j in range(2)], dim=1) for i in range(2)]
    return {"lokr_w1": one, "lokr_w2": two}, torch.cat(blocks)


def rotated_rows(weight: Tensor, blocks: Tensor) -> Tensor:
    """R^T W of each block, with R by the inverse."""
    parts = []
    for block, rows in zip(blocks, weight.flatten(1).chunk(len(blocks)), strict=True):
        skew, eye = block - block.T, torch.eye(len(block), dtype=torch.float64)
        parts.append(((eye + skew) @ torch.linalg.inv(eye - skew)).T @ rows)
    return torch.cat(parts).reshape(weight.shape)


def butterfly_of_peft(weight: Tensor, stages: Tensor, magnitudes: Tensor) -> Tensor:
    """With permutations and block diagonals as whole matrices."""
    columns, size = weight[0].numel(), stages.shape[-1]
    whole = torch.eye(columns, dtype=torch.float64)
    for index, stage in enumerate(stages):
        run = size * 2**index
        order = []
        for start in range(0, columns, run):
            halves = [list(range(start + k * size // 2, start + (k + 1) * size // 2)) for k in range(2 * run // size)]
            order += [*itertools.chain(*halves[0::2], *halves[1::2])]
        moved = torch.eye(columns, dtype=torch.float64)[order]
        skew, eye = (stage - stage.mT) / 2, torch.eye(size, dtype=torch.float64)
        rotation = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in skew))
        whole = moved @ rotation @ moved.T @ whole
    inputs = weight.T if weight.ndim == 2 else weight.reshape(columns, len(weight))
    result = (whole @ inputs) * magnitudes.flatten()
    return result.T if weight.ndim == 2 else result.reshape(weight.shape)


Case = tuple[str, dict[str, Tensor], Tensor]
SHAPES = [(8, 4), (8, 4, 3, 3)]


def cases(weight: Tensor, s: float) -> dict[str, Case]:
    """Kind, factors and the weight wanted at strength s."""
    shape = tuple(weight.shape)
    low, delta = product(3, shape)
    loha, haha = hadamard(shape)
    lokr, kron = kronecker(shape)
    ones = [1] * (weight.ndim - 2)
    alpha, rows, columns = torch.tensor(1.5), drawn(8, 1, *ones), drawn(1, 4, *ones)
    direction = weight + 0.5 * delta
    per_row = direction.flatten(1).norm(dim=1).view(-1, 1, *ones)
    per_column = direction.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *ones)
    partly = weight + s * delta
    blocks = drawn(4, 2, 2)
    pairs, magnitudes = drawn(2, weight[0].numel() // 2, 2, 2), drawn(8, 1)
    a1, a2, b1, b2 = drawn(4, 2), drawn(2, 4, seed=1), drawn(8, 2), drawn(2, weight[0].numel())
    applied = torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).reshape(shape)
    full, vector = drawn(*shape, seed=5), drawn(8)
    return {
        "lora": ("lora", low | {"alpha": alpha}, weight + s * 0.5 * delta),
        "lora without alpha": ("lora", low, weight + s * delta),
        "lora, scalar and scale": (
            "lora", low | {"scalar": torch.tensor(2.0), "scale": torch.tensor(0.25)}, weight + s * 0.5 * delta,
        ),
        "loha": ("loha", loha | {"alpha": alpha}, weight + s * 0.5 * haha),
        "lokr": ("lokr", lokr | {"alpha": torch.tensor(9.0)}, weight + s * kron),
        "dora by row": ("lora", low | {"alpha": alpha, "dora_scale": rows}, weight + s * (rows * direction / per_row - weight)),
        "dora by column": (
            "lora", low | {"alpha": alpha, "dora_scale": columns}, weight + s * (columns * direction / per_column - weight),
        ),
        "dora of peft": (
            "lora", low | {"magnitude": rows.flatten()}, rows * partly / partly.flatten(1).norm(dim=1).view(-1, 1, *ones),
        ),
        "dora of loha": (
            "loha", loha | {"dora_scale": rows},
            weight + s * (rows * (weight + haha) / (weight + haha).flatten(1).norm(dim=1).view(-1, 1, *ones) - weight),
        ),
        "oft": ("oft", {"oft_blocks": blocks}, weight + s * (rotated_rows(weight, blocks) - weight)),
        "oft, rescaled": ("oft", {"oft_blocks": blocks * 0, "rescale": rows}, weight * (1 + s * (rows - 1))),
        "boft of peft": ("peft_boft", {"boft_R": pairs, "boft_s": magnitudes}, butterfly_of_peft(weight, pairs, magnitudes)),
        "glora": ("glora", {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "alpha": torch.tensor(1.0)}, weight + s * 0.5 * applied),
        "ia3": ("ia3", {"weight": vector, "on_input": torch.tensor(0)}, weight + s * weight * vector.view(-1, 1, *ones)),
        "diff": ("diff", {"diff": full}, weight + s * full),
        "set": ("set", {"set_weight": full}, full),
    }  # fmt: skip


NAMES = list(cases(drawn(*SHAPES[0]), 1.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_each_kind_equals_its_formula(name: str, shape: tuple[int, ...]) -> None:
    weight = drawn(*shape)
    for s in (1.0,) if name == "boft of peft" else (1.0, -0.7):
        kind, factors, wanted = cases(weight, s)[name]
        got = merged(weight, [Change(where="f: layer", kind=kind, tensors=factors, scale=s)])
        assert (got - wanted).abs().max() < 1e-12 * max(1.0, float(wanted.abs().max())), s
        half = {role: value.float() for role, value in factors.items()}
        single = merged(weight.float(), [Change(where="f: layer", kind=kind, tensors=half, scale=s)])
        assert single.dtype == torch.float32 and (single - wanted).abs().max() < 1e-5 * float(wanted.abs().max())
    still = merged(weight, [Change(where="f: layer", kind=kind, tensors=factors, scale=0.0)])
    assert name in ("set", "dora of peft") or torch.equal(still, weight), "strength 0 changes nothing"


def test_boft_mixes_rows_by_stages() -> None:
    """LyCORIS': written out with the rows' places, on a convolution; a strength turns each stage part of the way."""
    weight, stages, s = drawn(8, 2, 3, 3), drawn(3, 4, 2, 2), 0.6
    wanted = weight
    for j, blocks in enumerate(stages):
        result = torch.empty_like(wanted)
        pairs = [(base + offset, base + offset + 2**j) for base in range(0, 8, 2 * 2**j) for offset in range(2**j)]
        for block, (first, second) in zip(blocks, pairs, strict=True):
            skew, eye = block - block.T, torch.eye(2, dtype=torch.float64)
            r = eye + s * ((eye + skew) @ torch.linalg.inv(eye - skew) - eye)
            result[first], result[second] = (r[i, 0] * wanted[first] + r[i, 1] * wanted[second] for i in range(2))
        wanted = result
    got = merged(weight, [Change(where="f", kind="oft", tensors={"oft_blocks": stages}, scale=s)])
    assert (got - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_oft_of_peft_turns_the_columns(shape: tuple[int, ...]) -> None:
    weight, size = drawn(*shape), 4
    columns = weight[0].numel()
    for count, terms in ((columns // size, 0), (columns // size, 6), (1, 5)):
        triangle = 0.2 * drawn(count, size * (size - 1) // 2)
        blocks = []
        for values in triangle:
            skew, eye = torch.zeros(size, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
            for value, (row, column) in zip(values, itertools.combinations(range(size), 2), strict=True):
                skew[row, column], skew[column, row] = value, -value
            powers = [torch.linalg.matrix_power(skew, k) for k in range(6)]
            series = {6: powers[0] + 2 * sum(powers[1:5]) + powers[5], 5: powers[0] + 2 * sum(powers[1:4]) + powers[4]}
            blocks.append(series.get(terms, (eye - skew) @ torch.linalg.inv(eye + skew)))
        whole = torch.block_diag(*blocks * (columns // size // count))
        change = Change(where="f", kind="peft_oft", tensors={"oft_R": triangle}, scale=1.0, stated=Stated(neumann_terms=terms))
        assert (merged(weight, [change]).flatten(1) - weight.flatten(1) @ whole.T).abs().max() < 1e-12


def test_tucker_factors_sparse_rests_and_older_glora() -> None:
    weight, mid = drawn(6, 4, 3, 3), drawn(3, 3, 3, 3)
    up, down = drawn(6, 3, 1, 1), drawn(3, 4, 1, 1)
    wanted = torch.zeros_like(weight)
    for m, n in itertools.product(range(3), repeat=2):
        wanted += up[:, m].view(6, 1, 1, 1) * down[n].view(1, 4, 1, 1) * mid[m, n]
    locon = Change(where="f", kind="lora", tensors={"up": up, "down": down, "mid": mid, "alpha": torch.tensor(6)}, scale=0.5)
    assert (merged(weight, [locon]) - weight - wanted).abs().max() < 1e-12
    core, a, b, w1 = drawn(2, 2, 3, 3), drawn(2, 3), drawn(2, 2), drawn(2, 2)
    inner = torch.zeros(3, 2, 3, 3, dtype=torch.float64)
    for i, j in itertools.product(range(2), repeat=2):
        inner += a[i].view(3, 1, 1, 1) * b[j].view(1, 2, 1, 1) * core[i, j]
    lokr = Change(where="f", kind="lokr", tensors={"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core}, scale=1.0)
    assert (merged(weight, [lokr]) - weight - torch.kron(w1[..., None, None], inner)).abs().max() < 1e-12
    low, delta = product(2, (6, 4))
    rest = {
        "bias_indices": torch.tensor([[0, 5, 0], [1, 3, 1]]),
        "bias_values": f64([1, 2, 3]),
        "bias_size": torch.tensor([6, 4]),
    }
    extracted = merged(weight[..., 0, 0], [Change(where="f", kind="lora", tensors=low | rest, scale=1.0)]) - weight[..., 0, 0]
    delta[0, 1] += 4
    delta[5, 3] += 2
    assert (extracted - delta).abs().max() < 1e-12
    a1, a2, b1, b2 = drawn(2, 4), drawn(4, 2), drawn(2, 4, seed=1), drawn(6, 2)
    older = Change(where="f", kind="glora", tensors={"a1": a1, "a2": a2, "b1": b1, "b2": b2}, scale=1.0)
    flat = weight[..., 0, 0]
    assert (merged(flat, [older]) - (flat + flat @ a2 @ a1 + b2 @ b1)).abs().max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_of_five_in_any_order(shape: tuple[int, ...]) -> None:
    """Linear in W or not: each change is that of the file's own weight, so the sum has no order; float32 to rounding."""
    weight = drawn(*shape)
    made = cases(weight, 0.8)
    for names in (
        ("lora", "loha", "lokr", "diff", "lora, scalar and scale"),
        ("dora by row", "oft", "glora", "set", "dora of peft"),
    ):
        changes = [Change(where=name, kind=made[name][0], tensors=made[name][1], scale=0.8) for name in names]
        wanted = weight + sum(made[name][2] - weight for name in names)
        for order in itertools.permutations(changes):
            assert (merged(weight, order) - wanted).abs().max() < 1e-11
            assert (merged(weight.float(), order) - wanted).abs().max() < 1e-5 * float(wanted.abs().max())


def test_two_that_replace_the_same_weight_are_refused() -> None:
    both = [Change(where=name, kind="set", tensors={"set_weight": drawn(2, 2)}, scale=1.0) for name in "ab"]
    with pytest.raises(ModelError, match="a and b: both replace the same weight"):
        merged(drawn(2, 2), both)


def test_parts_of_a_joint_projection_and_of_a_wider_input() -> None:
    low, delta = product(2, (12, 4))
    for part in range(3):
        third = Change(where="f", kind="lora", tensors=low, scale=1.0, part=part, parts=3)
        assert (
            torch.equal(merged(torch.zeros(4, 4), [third]), delta[4 * part : 4 * part + 4].float())
            or (merged(torch.zeros(4, 4, dtype=torch.float64), [third]) - delta[4 * part : 4 * part + 4]).abs().max() < 1e-12
        )
    rotated = Change(where="f: q", kind="oft", tensors={"oft_blocks": drawn(2, 6, 6)}, scale=1.0, parts=3)
    with pytest.raises(ModelError, match="f: q: changes a joint projection"):
        merged(torch.zeros(4, 4), [rotated])
    low, delta = product(2, (6, 4, 3, 3))
    wide = merged(
        torch.zeros(6, 9, 3, 3, dtype=torch.float64), [Change(where="f", kind="lora", tensors=low, scale=1.0, widens=True)]
    )
    assert (wide[:, :4] - delta).abs().max() < 1e-12 and not wide[:, 4:].any()


DAMAGED: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "nan alpha": ("lora", {"alpha": torch.tensor(torch.nan)}, "its alpha is nan"),
    "huge alpha": ("lora", {"alpha": torch.tensor(2**62)}, "its alpha is 4.61169e"),
    "many alphas": ("lora", {"alpha": torch.ones(3)}, r"its alpha is of shape \(3,\)"),
    "nan": ("lora", {"up": torch.full((8, 3), torch.nan)}, "values that are not finite"),
    "ranks apart": ("lora", {"down": torch.ones(2, 4)}, r"down \(2, 4\), up \(8, 3\) do not fit a weight of \(8, 4\)"),
    "another width": ("lora", {"down": torch.ones(3, 5)}, "do not fit a weight of"),
    "magnitudes": ("lora", {"dora_scale": torch.ones(5)}, "do not fit a weight of"),
    "sparse": (
        "lora",
        {"bias_indices": torch.tensor([[9], [9]]), "bias_values": torch.ones(1), "bias_size": torch.tensor([8, 4])},
        "do not fit a weight of",
    ),
    "sparse size": (
        "lora",
        {"bias_indices": torch.ones(2, 1), "bias_values": torch.ones(1), "bias_size": torch.tensor([2**40, 2**40])},
        "do not fit a weight of",
    ),
    "one row": ("loha", {"hada_w2_a": torch.ones(1, 3)}, "do not fit a weight of"),
    "blocks": ("oft", {"oft_blocks": torch.ones(3, 2, 2)}, "do not fit a weight of"),
    "no square": ("oft", {"oft_blocks": torch.ones(4, 2, 3)}, "do not fit a weight of"),
    "stages": ("oft", {"oft_blocks": torch.ones(4, 4, 2, 2)}, "do not fit a weight of"),
    "no triangle": ("peft_oft", {"oft_R": torch.ones(2, 2)}, "do not fit a weight of"),
    "pairs": ("peft_boft", {"boft_R": torch.ones(1, 3, 2, 2), "boft_s": torch.ones(8, 1)}, "do not fit a weight of"),
    "vector": ("ia3", {"weight": torch.ones(5)}, "do not fit a weight of"),
    "difference": ("diff", {"diff": torch.ones(8, 5)}, "do not fit a weight of"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_factors_name_the_layer(name: str) -> None:
    kind, wrong, words = DAMAGED[name]
    whole = {"lora": product(3, (8, 4))[0], "loha": hadamard((8, 4))[0], "ia3": {"on_input": torch.tensor(0)}}.get(kind, {})
    with pytest.raises(ModelError, match=f"f.safetensors: layer: .*{words}"):
        merged(drawn(8, 4), [Change(where="f.safetensors: layer", kind=kind, tensors=whole | wrong, scale=1.0)])


def test_every_kind_has_a_formula() -> None:
    from hires.checkpoints.adapters.keys import KINDS

    assert FORMULAS.keys() == KINDS.keys()
