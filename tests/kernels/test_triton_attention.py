"""The Triton kernel under the interpreter (in a process of its own: the variable is read at import), and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hires.kernels.attention_policies import NPA, Global, Policy, Windows
from hires.kernels.reference import attention_chunked
from hires.kernels.torch_windows import attention_masked
from hires.kernels.triton_attention import attention_kernel, attention_triton, blocks
from hires.kernels.tuning import SHARED_KIB, Config, config

SMALL = Config(16, 16, 4, 1)
HEADS = (40, 64, 72, 80, 128, 160, 512)


def test_the_kernel_gives_the_references_results_under_the_interpreter() -> None:
    code = "from tests.kernels.test_triton_attention import interpreted; interpreted()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def interpreted() -> None:
    """Lengths of 1, odd ones, masks, strides, every head size; then windows. Unwritten results are NaN.

    The root mean square error against float64 is at most twice that of PyTorch's own attention in the same type.
    """
    empty = torch.empty
    torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))  # type: ignore[assignment]
    torch.manual_seed(0)
    cases = [(1, 1, 40, None), (17, 33, 64, "bool"), (19, 5, 72, "bias"), (33, 17, 160, None), (18, 21, 512, "bool")]
    for n, m, d, kind in [*cases, (5, 40, 80, None), (16, 16, 128, "bias")]:
        for dtype in (torch.float32, torch.float16):
            q, k, v = (torch.randn(2, length, 2, d).to(dtype).transpose(1, 2) for length in (n, m, m))
            keep = torch.rand(2, 1, 1, m) > 0.4
            keep[..., 0] = True
            mask = {None: None, "bool": keep, "bias": torch.randn(2, 1, 1, m).to(dtype)}[kind]
            exact = attention_chunked(q.double(), k.double(), v.double(), mask, d**-0.5)
            found = attention_triton(q, k, v, mask, d**-0.5, SMALL)
            theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            ours, torchs = ((x.double() - exact).square().mean().sqrt() for x in (found, theirs))
            assert ours <= 2 * torchs, (n, m, d, kind, dtype, ours, torchs)
    nothing, far, long = q[:, :, :1], beyond_32_bits(), torch.randn(1, 1, 10**6, 16)
    keep = torch.zeros(2, 1, 1, 16, dtype=torch.bool)
    assert (attention_triton(nothing, k, v, keep, 0.1, SMALL) == 0).all(), "a query that attends to nothing gives 0"
    keys = far.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1)).normal_()
    exact = attention_masked(long[:, :, :2], keys, keys, (1, 2), Global(), 0.25)
    assert (attention_triton(long[:, :, :2], keys, keys, None, 0.25, SMALL) - exact).abs().max() <= 1e-6
    exact = attention_masked(long[:, :, :5], long, long, (1, 5), Global(), 0.25)
    found = attention_triton(long[:, :, :5], long, long, None, 0.25, Config(16, 16384, 4, 1))
    assert (found - exact).abs().max() <= 1e-5, "a million keys"
    policies: list[tuple[int, int, Policy]] = [
        (9, 13, NPA(8, (1, 3))), (16, 6, NPA(8, (3, 1), (True, False))), (7, 10, NPA(4, (1, 1), (True, True))),
        (1, 11, Windows(4, (0, 3))), (10, 9, Windows(4, (3, 2), (False, True))), (5, 6, NPA(8)),
    ]  # fmt: skip
    for h, w, policy in policies:
        assert isinstance(policy, NPA | Windows)
        q, k, v = (torch.randn(1, h * w, 2, 16).transpose(1, 2) for _ in range(3))
        out = attention_triton(q, k, v, None, 0.25, SMALL, (h, w), policy)
        assert (out - attention_masked(q, k, v, (h, w), policy, 0.25)).abs().max() <= 5e-6, (h, w, policy)


def beyond_32_bits() -> torch.Tensor:
    """Memory of 2^31 float32 elements and a few more; pages that nobody touches are not there."""
    return torch.from_numpy(np.empty(2**31 + 64, dtype=np.float32))


def compiled(architecture: int, d: int, windowed: bool, masked: bool, kind: str) -> tuple[int, int]:
    """Shared bytes, and bytes of local memory per thread (spills and stack) by cuobjdump."""
    chosen = config(d, architecture, kind == "fp32")
    piece, result = blocks(d)
    constants = {
        "D": d, "BLOCK_D": piece, "BLOCK_V": result, "BLOCK_M": chosen.queries, "BLOCK_N": chosen.keys,
        "MASKED": masked, "WINDOWED": windowed, "ROUND_H": windowed, "ROUND_W": False,
    }  # fmt: skip
    names = attention_kernel.arg_names
    kinds = {"scale": "fp32", "MASK": "*fp32"} | dict.fromkeys(("Q", "K", "V", "OUT"), f"*{kind}")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    unit = {(names.index(name),): 1 for name in ("qd", "kd", "vd", "od")}  # as a launch specialises strides of 1
    signature |= dict.fromkeys(("qd", "kd", "vd", "od"), "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()} | unit
    aligned = [
        (n, i) for i, n in enumerate(names) if n in ("Q", "K", "V", "OUT", "qn", "kn", "vn", "on", "qh", "kh", "vh", "oh")
    ]
    attrs = {(i,): [["tt.divisibility", 16]] for n, i in aligned if d % 16 == 0 or n.isupper()}
    source = ASTSource(attention_kernel, signature, constexprs=values, attrs=attrs)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    facts = dict(part.split(":")[:2] for part in said.split() if part.startswith(("STACK:", "LOCAL:", "REG:")))
    print(f"sm_{architecture} d={d} {kind} windowed={windowed} masked={masked} shared={made.metadata.shared} {facts}")
    return made.metadata.shared, int(facts["LOCAL"]) + int(facts["STACK"])


SAMPLE = [(89, 72, True, False, "fp16"), (90, 64, False, True, "bf16")]
EVERYTHING = [
    pytest.param(a, d, windowed, not windowed, kind, marks=pytest.mark.slow)
    for a in SHARED_KIB for d in HEADS for windowed in (False, True)
    for kind in ("fp16", "bf16", "fp32") if kind != "fp32" or d <= 256
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "d", "windowed", "masked", "kind"), [*SAMPLE, *EVERYTHING])
def test_the_kernel_compiles_within_the_shared_memory_and_without_spills(
    architecture: int, d: int, windowed: bool, masked: bool, kind: str
) -> None:
    shared, local = compiled(architecture, d, windowed, masked, kind)
    assert shared <= SHARED_KIB[architecture] * 1024
    assert local == 0
