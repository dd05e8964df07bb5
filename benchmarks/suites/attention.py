"""`python -m benchmarks attention`: every backend and policy on the attention of CosXL, PixArt-Σ and the autoencoder.

Shapes are those of one picture at 1024 to 8192 px. A row has quantiles, TFLOP/s with its share of a large matrix product,
and the error of sampled rows against float64. What would take longer than `--limit`, what is refused and what runs out of
memory are values. `--layer` times a PixArt layer on a canvas of 128 x 128 tokens under NPA and Global.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, append_row, stamp
from benchmarks.suites.maps import DTYPES, milli
from hires._imports import quiet_imports
from hires.bench.timing import Timed, peak_flops, rms, timed
from hires.kernels.attention_policies import NPA, Global, KVPool, Policy, Rows, Windows, attended, axis
from hires.kernels.dispatch import BACKENDS, attention
from hires.kernels.torch_windows import key_lines, pooled
from hires.models.attention_processors import DispatchedAttention

SIZES = (1024, 2048, 4096, 8192)
SAMPLED = 32
EXPECTED_SHARE = 0.2  # of the matrix product's rate, for the estimate that `--limit` goes by


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One attention call: `keys` tokens of text, masked or not, or None for self-attention over the canvas."""

    model: str
    layer: str
    heads: int
    head_dim: int
    canvas: tuple[int, int]
    policy: Policy
    keys: int | None = None
    masked: bool = False

    @property
    def flops(self) -> float:
        pairs = self.canvas[0] * self.canvas[1] * self.keys if self.keys else attended(self.policy, self.canvas)
        return 4.0 * self.heads * self.head_dim * pairs


def calls(side: int, model: str | None = None) -> Iterator[Call]:
    """The calls of one evaluation at a square picture; windows follow the training length of the level."""
    for name, layer, heads, head_dim, px, window in (
        ("cosxl", "level 1", 10, 64, 16, 64), ("cosxl", "level 2", 20, 64, 32, 32), ("pixart", "block", 16, 72, 16, 64),
        ("vae", "mid block", 1, 512, 8, 128),
    ):  # fmt: skip
        canvas = max(1, side // px), max(1, side // px)
        common = {"model": name, "layer": layer, "heads": heads, "head_dim": head_dim, "canvas": canvas}
        if model not in (None, name):
            continue
        for policy in (Global(), NPA(window), Windows(window), KVPool(2)):
            if policy == Global() or not isinstance(policy, NPA | Windows) or policy.window < max(canvas):
                yield Call(**common, policy=policy)  # type: ignore[arg-type]
        if name != "vae":
            words, masked = (300, True) if name == "pixart" else (77, False)
            yield Call(**common, policy=Global(), keys=words, masked=masked)  # type: ignore[arg-type]


def tensors(call: Call, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys and values as projections leave them (tokens before heads), and the mask of a padded prompt."""
    count = call.canvas[0] * call.canvas[1]
    generator = torch.Generator(device).manual_seed(0)

    def made(length: int) -> Tensor:
        x = torch.randn(1, length, call.heads, call.head_dim, generator=generator, device=device, dtype=torch.float32)
        return x.to(dtype).transpose(1, 2)

    keys = call.keys or count
    mask = torch.zeros(1, 1, 1, keys, dtype=dtype, device=device) if call.masked else None
    if mask is not None:
        mask[..., keys // 3 :] = -10000.0
    return made(count), made(keys), made(keys), mask


def exact_rows(call: Call, parts: tuple[Tensor, Tensor, Tensor, Tensor | None], picked: list[int]) -> Tensor:
    """Some queries' results in float64, over the keys that the policy's definition names: (1, heads, len(picked), d)."""
    q, k, v, mask = parts
    if isinstance(call.policy, KVPool):
        k, v = (pooled(x.double(), call.canvas, call.policy.r) for x in (k, v))
    rows = []
    for index in picked:
        seen = keys_of(call, index)
        part = k if seen is None else k[:, :, seen]
        scores = q[:, :, index : index + 1].double() @ part.double().transpose(-1, -2) * call.head_dim**-0.5
        if mask is not None:
            scores = scores + mask.double()
        rows.append(scores.softmax(-1) @ (v if seen is None else v[:, :, seen]).double())
    return torch.cat(rows, dim=2)


def keys_of(call: Call, index: int) -> list[int] | None:
    """The tokens that a query of the canvas attends to; None for all."""
    if call.keys or not isinstance(call.policy, NPA | Windows | Rows):
        return None
    row, col = divmod(index, call.canvas[1])
    along = [axis(call.policy, length, which) for which, length in enumerate(call.canvas)]
    lines, columns = (key_lines(a, place // a.block) for a, place in zip(along, (row, col), strict=True))
    return [i * call.canvas[1] + j for i in lines for j in columns]


def measure(
    call: Call, backend: str, parts: Any, exact: Tensor, picked: list[int], limit: float, seconds: float = 2.0
) -> dict[str, object]:
    q, k, v, mask = parts
    ceiling = peak_flops(q.device, q.dtype)
    estimate = call.flops / (EXPECTED_SHARE * ceiling)

    def run() -> Tensor:
        policy = Global() if call.keys else call.policy
        return attention(q, k, v, canvas=call.canvas, mask=mask, policy=policy, backend=backend)

    if estimate > limit:
        taken, error = Timed(state=f"skipped: about {estimate:.0f} s a call"), None
    else:
        taken = timed(run, q.device, least=3, seconds=min(seconds, limit))
        error = rms(run()[:, :, picked].cpu(), exact) if taken.p50 else None
    rate = call.flops / taken.p50 if taken.p50 else None
    kind = f"{call.layer}, {call.keys} words" if call.keys else call.layer
    return {
        "model": call.model, "layer": kind, "heads": f"{call.heads}x{call.head_dim}", "canvas": "x".join(map(str, call.canvas)),
        "policy": str(call.policy), "dtype": str(q.dtype).removeprefix("torch."), "backend": backend,
        "p20_ms": milli(taken.p20), "p50_ms": milli(taken.p50), "p80_ms": milli(taken.p80), "repeats": taken.repeats,
        "tflop": round(call.flops / 1e12, 4), "tflop_per_s": None if rate is None else round(rate / 1e12, 4),
        "share_of_peak": None if rate is None else round(rate / ceiling, 3), "peak_mib": round(taken.peak_bytes / 2**20, 1),
        "rms_error": None if error is None else float(f"{error:.3g}"), "state": taken.state,
    }  # fmt: skip


def line(row: dict[str, object]) -> str:
    head = f"{row['model']:<7}{row['layer']:<20}{row['canvas']:<11}{row['policy']:<12}{row['backend']:<10}"
    if row["state"] != "ran":
        return head + str(row["state"])
    return f"{head}{row['p50_ms']:>12} ms {row['tflop_per_s']:>8} TFLOP/s ({row['share_of_peak']}), error {row['rms_error']}"


def layer_ratio(seconds: float = 10.0) -> dict[str, float]:
    """PixArt's self-attention call and its whole layer on 128 x 128 tokens, windows of 64: Global's time over NPA's.

    Calls alternate, so that what else the machine does falls on both; medians.
    """
    with quiet_imports():
        from diffusers.models.attention import BasicTransformerBlock
    q, k, v = (torch.randn(1, 128 * 128, 16, 72).transpose(1, 2) for _ in range(3))
    torch.manual_seed(0)
    block = BasicTransformerBlock(
        1152, 16, 72, cross_attention_dim=1152, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for attn in (block.attn1, block.attn2):
        attn.set_processor(DispatchedAttention())
    tokens, words, time_table = torch.randn(1, 128 * 128, 1152), torch.randn(1, 304, 1152), torch.randn(1, 6 * 1152)

    def whole(policy: Policy) -> Tensor:
        kwargs = {"canvas": (128, 128), "policy": policy}
        out: Tensor = block(tokens, encoder_hidden_states=words, timestep=time_table, cross_attention_kwargs=kwargs)
        return out

    ways = {"attention": lambda p: attention(q, k, v, canvas=(128, 128), policy=p), "layer": whole}
    found = {}
    with torch.inference_mode():
        for name, run in ways.items():
            taken: dict[Policy, list[float]] = {Global(): [], NPA(64): []}
            until = time.perf_counter() + seconds
            while len(taken[Global()]) < 3 or time.perf_counter() < until:
                for policy, values in taken.items():
                    begun = time.perf_counter()
                    run(policy)
                    values.append(time.perf_counter() - begun)
            middle = {str(policy): statistics.median(values) for policy, values in taken.items()}
            found[name] = middle["global"] / middle["npa:64"]
            found[f"{name} seconds, global"], found[f"{name} seconds, npa"] = middle["global"], middle["npa:64"]
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__)
    parser.add_argument("--size", action="append", type=int, metavar="PX", help="side of the picture; default 1024 to 8192")
    parser.add_argument("--model", choices=("cosxl", "pixart", "vae"))
    parser.add_argument("--backend", action="append", choices=[backend.name for backend in BACKENDS])
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bf16 on a card, fp32 on a CPU")
    parser.add_argument("--limit", type=float, default=30.0, metavar="S", help="skip calls that would take longer")
    parser.add_argument("--layer", action="store_true", help="time a PixArt layer under NPA and Global instead")
    parser.add_argument("--quick", action="store_true", help="toy sizes: every code path in seconds")
    parser.add_argument("--csv", action="store_true", help="append to benchmarks/results/attention.csv")
    options = parser.parse_args(arguments)
    if options.layer:
        ratios = layer_ratio()
        print(f"NPA is {ratios['attention']:.2f} times faster in the self-attention call, {ratios['layer']:.2f} in the layer")
        print(json.dumps(ratios))
        return 0
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype, rows = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")], []
    for side in options.size or ((2048 // 8,) if options.quick else SIZES):
        for call in calls(side, options.model):
            parts = tensors(call, dtype, device)
            count = call.canvas[0] * call.canvas[1]
            picked = sorted({(7919 * i + count // 3) % count for i in range(min(SAMPLED, count))})
            exact = exact_rows(call, parts, picked).cpu()
            for backend in options.backend or [b.name for b in BACKENDS]:
                rows.append(
                    {"side": side} | measure(call, backend, parts, exact, picked, options.limit, 0.0 if options.quick else 2.0)
                )
                print(f"{side:>5} {line(rows[-1])}", flush=True)
                if options.csv:
                    append_row(RESULTS / "attention.csv", stamp() | rows[-1])
    print(json.dumps({"suite": "attention", "device": str(device), "rows": rows}))
    return 0
