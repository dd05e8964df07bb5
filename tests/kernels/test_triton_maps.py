"""GroupNorm, blending and conversion: the kernels under the interpreter against the references, and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hires.images.whole import to_uint8
from hires.kernels import blend, group_norm
from hires.kernels.backends import BackendRefused
from hires.kernels.blend import blend_accumulate, to_integers
from hires.kernels.group_norm import MapSpec, Moments, group_norm_apply, group_norm_stats
from hires.kernels.torch_windows import pooled
from hires.kernels.tuning import SHARED_KIB, launch

Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows of a larger map": lambda x: F.pad(x, (0, 0, 2, 3))[:, :, 2 : 2 + x.shape[2]],
    "every other column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}
Shape = tuple[int, int, int, int]
SHAPES: list[Shape] = [(1, 8, 5, 7), (2, 12, 1, 9), (1, 20, 6, 1), (2, 6, 33, 18)]
EVERY_PAIR = [(shape, name) for shape in SHAPES for name in LAYOUTS]
DIAGONAL = list(zip(SHAPES, LAYOUTS, strict=True))  # each shape and each layout once: the interpreter takes a second for a pair


def exact_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    flat = x.double().reshape(x.shape[0], groups, -1)
    return flat.mean(-1), flat.var(-1, correction=0)


def check_stats(found: Moments, x: Tensor, groups: int) -> None:
    """Within twice what torch's own float32 reduction is off by, and a few roundings of the value."""
    mean, var = exact_moments(x, groups)
    flat = x.float().reshape(x.shape[0], groups, -1)
    theirs = (flat.mean(-1), flat.var(-1, correction=0))
    assert found.count == x[0, : x.shape[1] // groups].numel()
    for value, exact, other in zip((found.mean, found.var), (mean, var), theirs, strict=True):
        bar = 2 * (other.double() - exact).abs().max() + 4e-7 * exact.abs().max() + 1e-7 * var.sqrt().max()
        assert (value.double() - exact).abs().max() <= bar


def check_all(backend: str | None, pairs: Iterable[tuple[Shape, str]]) -> None:
    """Every map kernel on each shape in a layout, unwritten results NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    poison = lambda x: x.fill_(float("nan")) if x.is_floating_point() else x.fill_(77)  # noqa: E731
    torch.empty = lambda *a, **k: poison(empty(*a, **k))  # type: ignore[assignment]
    torch.empty_like = lambda *a, **k: poison(empty_like(*a, **k))  # type: ignore[assignment]
    try:
        for shape, name in pairs:
            for dtype in (torch.float32, torch.float16):
                check_maps(backend, shape, LAYOUTS[name], dtype, name)
        check_offset(backend)
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def check_maps(backend: str | None, shape: tuple[int, int, int, int], layout: Layout, dtype: torch.dtype, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = layout(torch.randn(shape, generator=generator).to(dtype))
    groups = 4 if shape[1] % 4 == 0 else 3
    check_stats(group_norm_stats(x, groups, backend=backend), x, groups)
    scale, shift = (torch.randn(shape[0], shape[1], 1, 1, generator=generator) for _ in range(2))
    for silu in (False, True):
        exact = x.double() * scale.double() + shift.double()
        theirs = x * scale.to(dtype) + shift.to(dtype)
        exact, theirs = (F.silu(exact), F.silu(theirs)) if silu else (exact, theirs)
        found = group_norm_apply(x, scale, shift, silu=silu, backend=backend)
        assert found.dtype == dtype and found.shape == x.shape, name
        floor = torch.finfo(dtype).eps * exact.abs().max() / 2
        assert (found.double() - exact).abs().max() <= max(2 * (theirs.double() - exact).abs().max(), floor), (name, silu)
    canvas = torch.randn(shape[0], shape[1], shape[2] + 5, shape[3] + 4, generator=generator)
    rows, cols = torch.rand(shape[2], generator=generator), torch.rand(shape[3], generator=generator)
    for top, left in ((0, 0), (5, 4), (2, 1)):
        expected, found = canvas.double(), canvas.clone()
        expected[..., top : top + shape[2], left : left + shape[3]] += rows[:, None] * cols[None, :] * x.double()
        blend_accumulate(found, x, rows, cols, top, left, backend=backend)
        assert (found.double() - expected).abs().max() <= 1e-6, (name, top, left)
    band = layout(torch.cat([x, x, x], 1)[:1, :3].float() * 0.8).to(dtype)[0]
    assert np.array_equal(to_integers(band, backend=backend).numpy(), to_uint8(band.float().permute(1, 2, 0).numpy()))
    deep = to_integers(band, 16, backend=backend).to(torch.int64)
    wanted = ((band.double().permute(1, 2, 0).clamp(-1, 1) + 1) * 32767.5 + 0.5).floor()
    assert (deep - wanted).abs().max() <= 1, "a float32 half way between two integers"


def check_offset(backend: str | None) -> None:
    """A mean a thousand deviations from zero: what E[x^2] - E[x]^2 loses altogether."""
    x = torch.randn(1, 4, 40, 31, generator=torch.Generator().manual_seed(3)) + 1000.0
    mean, var = exact_moments(x, 2)
    found = group_norm_stats(x, 2, backend=backend)
    assert (found.var.double() / var - 1).abs().max() <= 2e-4
    assert (found.mean.double() / mean - 1).abs().max() <= 1e-6


def interpreted(pairs: Iterable[tuple[Shape, str]]) -> None:
    """The kernels by their names, on shapes in layouts: `why_not` lets a CPU pass, the interpreter stands for the card."""
    from dataclasses import replace

    for module, names in ((group_norm, ("STATS", "APPLY")), (blend, ("ACCUMULATE", "TO_INTEGERS"))):
        for name in names:
            setattr(module, name, tuple(replace(b, why_not=lambda spec: None) for b in getattr(module, name)))
    check_all("triton", pairs)
    from hires.kernels.triton_maps import pool_triton

    for h, w, r, d in ((6, 8, 2, 16), (7, 5, 3, 72), (1, 9, 2, 40), (4, 4, 1, 8)):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(2, h * w, 3, d).to(dtype).transpose(1, 2)
            exact = pooled(x.double(), (h, w), r)
            found, theirs = pool_triton(x, (h, w), r), pooled(x, (h, w), r)
            assert found.shape == exact.shape and found.dtype == dtype
            floor = torch.finfo(dtype).eps * exact.abs().max() / 2
            assert (found.double() - exact).abs().max() <= max(2 * (theirs.double() - exact).abs().max(), floor), (h, w, r)


@pytest.mark.parametrize("pairs", ["DIAGONAL", pytest.param("EVERY_PAIR", marks=pytest.mark.slow)])
def test_the_kernels_give_the_references_results_under_the_interpreter(pairs: str) -> None:
    code = f"from tests.kernels import test_triton_maps as maps; maps.interpreted(maps.{pairs})"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_torchs_way_gives_the_references_results() -> None:
    check_all("torch", EVERY_PAIR)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=5), st.sampled_from([0.0, 30.0, -1000.0]))
def test_moments_of_bands_merge_to_those_of_the_whole(width: int, cuts: list[int], offset: float) -> None:
    rows = 1 + sum(cuts)
    x = torch.randn(2, 6, rows, width, generator=torch.Generator().manual_seed(rows), dtype=torch.float64) + offset
    total: Moments | None = None
    for band in torch.split(x, [1, *cuts], dim=2):
        part = group_norm_stats(band, 3)
        total = part if total is None else total.merged(part)
    mean, var = exact_moments(x, 3)
    assert total is not None and total.count == x[0, :2].numel()
    torch.testing.assert_close(total.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(total.var, var, rtol=1e-9, atol=1e-12)


def test_stats_and_apply_are_the_modules_norm() -> None:
    norm = nn.GroupNorm(4, 12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 12, 9, 5, dtype=torch.float64)
    from hires.tiling.bands.norm import affine

    with torch.no_grad():
        found = group_norm_apply(x, *affine(norm, group_norm_stats(x, 4)), silu=True)
        torch.testing.assert_close(found, F.silu(norm(x)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_why_not_agrees_with_what_runs(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.ones(1, 4, 3, 3, device=device).to(dtype)
    one, spec = torch.ones(1, 4, 1, 1, device=device), MapSpec(device=device, dtype=dtype)
    canvas, line = torch.zeros(1, 4, 3, 3, device=device), torch.ones(3, device=device)
    calls: dict[Any, Callable[[str], Any]] = {
        group_norm.STATS: lambda name: group_norm_stats(x, 2, backend=name),
        group_norm.APPLY: lambda name: group_norm_apply(x, one, one, silu=True, backend=name),
        blend.ACCUMULATE: lambda name: blend_accumulate(canvas, x, line, line, 0, 0, backend=name),
        blend.TO_INTEGERS: lambda name: to_integers(x[0, :3], backend=name),
    }  # fmt: skip
    for backends, call in calls.items():
        for backend in backends:
            reason = backend.why_not(spec)
            if reason is None:
                call(backend.name)
            else:
                with pytest.raises(BackendRefused, match=reason.split(",")[0]):
                    call(backend.name)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="5 channels are not 2 groups"):
        group_norm_stats(torch.ones(1, 5, 2, 2), 2)
    with pytest.raises(ValueError, match="at 2, 0 on a canvas"):
        blend_accumulate(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 3, 3), torch.ones(3), torch.ones(3), 2, 0)
    with pytest.raises(ValueError, match="12 bits: give 8 or 16"):
        to_integers(torch.ones(3, 2, 2), 12)


KERNELS = {
    "group_norm_stats": "stats_kernel",
    "group_norm_apply": "apply_kernel",
    "blend": "accumulate_kernel",
    "integers": "integers_kernel",
    "pool": "pool_kernel",
}
FLOATS = ("COUNT", "MEAN", "SQUARES", "SCALE", "SHIFT", "CANVAS", "ROWS", "COLS")
SAMPLE = [(a, k, "bf16") for a in (80, 120) for k in KERNELS]
EVERYTHING = [
    pytest.param(a, k, t, marks=pytest.mark.slow) for a in SHARED_KIB for k in KERNELS for t in ("fp16", "bf16", "fp32")
]


def compiled(architecture: int, kernel: str, kind: str, block_c: int, silu: bool) -> tuple[int, int]:
    """Shared bytes, and bytes of local memory per thread (spills and stack) by cuobjdump."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hires.kernels import triton_maps

    chosen, function = launch(kernel, torch.empty(0)), getattr(triton_maps, KERNELS[kernel])
    block_p = max(16, chosen.elements // block_c)
    given = {"R": 2, "BLOCK_D": 128, "BLOCK_M": chosen.elements // 128}
    given |= {"BLOCK_C": block_c, "CHANNELS": max(1, block_c - 1), "BLOCK_P": block_p, "SILU": silu}
    constants = {name: value for name, value in given.items() if name in function.arg_names}
    kinds = dict.fromkeys(("X", "TILE", "BAND", "OUT"), f"*{kind}") | dict.fromkeys(FLOATS, "*fp32")
    kinds |= {"half": "fp32", "most": "fp32"} | ({"OUT": "*u8"} if kernel == "integers" else {})
    signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in function.arg_names}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, constexprs=values)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": chosen.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    facts = dict(part.split(":")[:2] for part in said.split() if part.startswith(("STACK:", "LOCAL:", "REG:")))
    print(f"sm_{architecture} {kernel} {kind} channels={block_c} shared={made.metadata.shared} {facts}")
    return made.metadata.shared, int(facts["LOCAL"]) + int(facts["STACK"])


@pytest.mark.parametrize(("architecture", "kernel", "kind"), [*SAMPLE, *EVERYTHING])
def test_the_kernels_compile_within_the_shared_memory_and_without_spills(architecture: int, kernel: str, kind: str) -> None:
    for block_c, silu in ((1, False), (4, True), (64, True)):
        shared, local = compiled(architecture, kernel, kind, block_c, silu)
        assert shared <= SHARED_KIB[architecture] * 1024
        assert local == 0
