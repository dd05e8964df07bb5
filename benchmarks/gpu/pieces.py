"""What the GPU suite runs: a slice is pieces, and a piece gives rows.

Out of memory is a value of a row; what else fails is raised. Toys on a CPU where the suite is dry.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.random_models import FAMILIES, random_weights, spec_of, vae_of
from hires.bench.models import evaluation, evaluation_flops
from hires.bench.row import BenchSetup
from hires.bench.suites import suite_of
from hires.devices.probe import probe
from hires.engine.run import run_plan
from hires.errors import HiresError, RequestError
from hires.kernels.attention_policies import EVERYWHERE
from hires.metrics.fidelity import psnr
from hires.options.render import RenderRequest
from hires.planning.planner import plan
from hires.tiling.geometry import Size
from hires.tiling.retry import free_memory, is_out_of_memory
from hires.tiling.vae import TiledVAE

SLICES = ("tests", "kernels", "vae", "denoise", "render", "budgets")
BUDGETS_GB = (8, 12, 16, 24)
LONGEST_S = 530.0  # of a piece that is a process of its own
CONTEXT_BYTES = 600 * 2**20  # of the CUDA context and libraries, beside what the allocator holds
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The machine and the scale: toys on a CPU where it is dry."""

    device: torch.device
    dry: bool

    @property
    def dtype(self) -> str:
        return "fp32" if self.dry else "bf16"

    def sides(self, *full: int) -> tuple[int, ...]:
        """Sides of pictures; two small ones for toys."""
        return (128, 256) if self.dry else full

    def budget(self, gigabytes: int) -> int:
        """Bytes that the allocator may hold under a budget; a hundredth for toys."""
        return gigabytes * 10**7 if self.dry else gigabytes * 10**9 - CONTEXT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What is run, and not again when its line is there."""

    name: str
    run: Callable[[], Rows]


def pieces(suite: Suite, name: str) -> Iterator[Piece]:
    """The pieces of a slice, cheapest first."""
    yield from {
        "tests": test_pieces, "kernels": kernel_pieces, "vae": vae_pieces, "denoise": denoise_pieces, "render": render_pieces,
        "budgets": budget_pieces,
    }[name](suite)  # fmt: skip


def test_pieces(suite: Suite) -> Iterator[Piece]:
    """The repository's tests that look at a card, and the kernels' tests on it."""
    files = ["tests/gpu"] if suite.dry else ["tests/gpu", "tests/kernels", "tests/tiling/test_vae.py"]
    for file in files:
        yield Piece(name=file, run=partial(tested, file))


def tested(file: str) -> Rows:
    """One row: how pytest ended. A failure raises, with the end of what it printed."""
    environment = os.environ | {"HIRES_TEST_GPU": "1", "OMP_NUM_THREADS": "4"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", file]
    begun = time.monotonic()
    ended = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=LONGEST_S
    )
    last = (ended.stdout.strip().splitlines() or [""])[-1]
    if ended.returncode:
        raise RuntimeError(f"{file}: {last}\n{ended.stdout[-3000:]}")
    return [{"file": file, "result": last, "seconds": round(time.monotonic() - begun, 1)}]


def kernel_pieces(suite: Suite) -> Iterator[Piece]:
    """Every kernel against every backend."""
    for side in suite.sides(1024, 2048, 4096, 8192):
        for name in ("attention", "norm"):
            yield Piece(name=f"{name} {side}", run=partial(benched, suite, name, side))


def benched(suite: Suite, name: str, side: int) -> Rows:
    setting = BenchSetup(device=suite.device, sizes=(Size(side, side),), quick=suite.dry)
    return [row.to_json() for row in suite_of(name)(setting)]


def vae_pieces(suite: Suite) -> Iterator[Piece]:
    """The exact autoencoder of full width under every cap, and diffusers' tiling, against the module where that fits."""
    for side in suite.sides(1024, 2048, 4096, 8192):
        for budget in BUDGETS_GB:
            yield Piece(name=f"vae {side} within {budget} GB", run=partial(decoded, suite, side, budget))


def decoded(suite: Suite, side: int, budget_gb: int) -> Rows:
    """Ours and diffusers' tiling with the allocator capped; quality against the untiled module, uncapped, where it has room."""
    vae: Any = vae_of(suite.dry, suite.dtype, suite.device)
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0)).to(suite.device, vae.dtype)
    exact = whole(vae, z)
    held = sum(p.numel() * p.element_size() for p in vae.parameters())
    tiled = TiledVAE(vae, budget_bytes=suite.budget(budget_gb) - held)
    rows = []
    for way in ("hires, exact", "diffusers tiling"):
        with capped(suite.device, suite.budget(budget_gb)):

            def run(way: str = way) -> Tensor:
                if way.startswith("hires"):
                    return tiled.decode(z)
                vae.enable_tiling()
                try:
                    found: Tensor = vae.decode(z).sample
                    return found
                finally:
                    vae.disable_tiling()

            rows.append(measured(suite, run, exact) | {"side": side, "budget_gb": budget_gb, "way": way})
    first = tiled.plan(side // 8, side // 8)[0]
    rows[0] |= {"policy": tiled.last.policy if tiled.last else "", "predicted_mib": round(first.peak_bytes / 2**20, 1)}
    return rows


def whole(vae: Any, z: Tensor) -> Any:
    """What the module itself decodes, on the host; None where it has no room."""
    try:
        with torch.inference_mode():
            return vae.decode(z).sample.float().cpu().numpy()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    free_memory()
    return None


def measured(suite: Suite, run: Callable[[], Tensor], exact: Any) -> dict[str, Any]:
    """Seconds of the second call, the allocator's peak, PSNR; or out of memory."""
    try:
        with torch.inference_mode():
            run()
            reset(suite.device)
            held = torch.cuda.memory_allocated(suite.device) if suite.device.type == "cuda" else 0
            begun = time.perf_counter()
            found = run()
            synchronise(suite.device)
            seconds = time.perf_counter() - begun
            peak = torch.cuda.max_memory_allocated(suite.device) - held if suite.device.type == "cuda" else 0
            span = 0.0 if exact is None else float(np.ptp(exact))
            quality = None if exact is None else round(min(999.0, psnr(found.float().cpu().numpy(), exact, span)), 2)
            finite = bool(torch.isfinite(found).all())
    except (HiresError, RuntimeError) as error:
        if not isinstance(error, HiresError) and not is_out_of_memory(error):
            raise
        return {"state": f"{type(error).__name__}: {str(error)[:160]}"}
    return {
        "state": "ran" if finite else "not finite", "seconds": round(seconds, 4), "peak_mib": round(peak / 2**20, 1),
        "peak_with_weights_mib": round((peak + held) / 2**20, 1), "psnr_db": quality,
    }  # fmt: skip


def denoise_pieces(suite: Suite) -> Iterator[Piece]:
    """One evaluation of the full-size networks by every strategy."""
    for family in FAMILIES:
        for side in suite.sides(1024, 2048, 4096, 8192):
            for way in ("tiles", "npa", "global"):
                yield Piece(name=f"{family} {side} {way}", run=partial(evaluated, suite, family, side, way))


def evaluated(suite: Suite, family: str, side: int, way: str) -> Rows:
    """Seconds, TFLOP/s and peak bytes of a guided evaluation, planned and measured."""
    from hires.pipelines.base import Runtime
    from hires.pipelines.load import load_session

    spec = spec_of(family, suite.dry)
    request = RenderRequest(
        prompt="", size=Size(side, side), strategy="tiled" if way == "tiles" else "direct", dtype=suite.dtype, steps=2,
        attention_policy="npa" if way == "npa" and side > spec.native_px else None,
    )  # fmt: skip
    row: dict[str, Any] = {"family": family, "side": side, "way": way}
    try:
        made = plan(request, spec, probe(suite.device))
    except HiresError as error:
        return [row | {"state": f"{type(error).__name__}: {str(error)[:160]}"}]
    stage = made.stages[-1]
    with random_weights(family, suite.dry):
        model = load_session(request, made, spec, Runtime.of(request, made, suite.device))
    model.weights.ready("network")
    predicted: int | None = next(cost.peak_bytes for cost in made.costs if cost.stage == stage.name)
    if way == "global" and stage.attention != EVERYWHERE:
        stage, predicted = replace(stage, attention=EVERYWHERE), None  # no plan is of it
    x = torch.randn(1, 4, *(side // 8,) * 2, generator=torch.Generator().manual_seed(0)).to(suite.device) * stage.sigma_start
    run = partial(evaluation(model, stage, x), stage.batch)
    taken = measured(suite, run, None)
    flops = evaluation_flops(spec, stage)
    rate = round(flops / taken["seconds"] / 1e12, 2) if "seconds" in taken else None
    extra = {"tiles": stage.grid.count, "batch": stage.batch, "tflop": round(flops / 1e12, 3), "tflop_per_s": rate}
    planned = None if predicted is None else round(predicted / 2**20, 1)
    return [row | taken | extra | {"predicted_with_weights_mib": planned, "offload": made.offload}]


def render_pieces(suite: Suite) -> Iterator[Piece]:
    """Whole renders: the shipped model, then full-size networks with random weights."""
    for side in suite.sides(1024, 2048, 4096, 8192):
        yield Piece(name=f"render demo {side}", run=partial(shipped, suite, side))
    for family in FAMILIES:
        for side in suite.sides(2048, 4096, 8192):
            yield Piece(name=f"render {family} {side}", run=partial(rendered, suite, family, side, None))


def shipped(suite: Suite, side: int) -> Rows:
    """The shipped model's picture, beside the CPU's own up to 1024 px."""
    import hires

    options: dict[str, Any] = {"size": (side, side), "seed": 1, "steps": 4 if suite.dry else None}
    result = hires.render("a sun on the right over green mountains and a lake at dusk", device=str(suite.device), **options)
    row = described(result) | {"family": "demo", "side": side}
    if side <= 1024:
        here = hires.render("a sun on the right over green mountains and a lake at dusk", device="cpu", vram="4GB", **options)
        row["psnr_db"] = round(min(999.0, psnr(result.pixels.astype(np.float32), here.pixels.astype(np.float32), 255.0)), 2)
    return [row]


def rendered(suite: Suite, family: str, side: int, budget_gb: int | None) -> Rows:
    """A render of random weights by the default preset, with the allocator capped where there is a budget."""
    spec = spec_of(family, suite.dry)
    most = None if budget_gb is None else suite.budget(budget_gb)
    budget = most if suite.dry or budget_gb is None else budget_gb * 10**9
    request = RenderRequest(prompt="", size=Size(side, side), dtype=suite.dtype)
    row: dict[str, Any] = {"family": family, "side": side, "budget_gb": budget_gb}
    try:
        made = plan(request, spec, probe(suite.device, budget))
        with random_weights(family, suite.dry), capped(suite.device, most):
            reset(suite.device)
            result = run_plan(request, made, spec, suite.device, lambda event: None)
    except RequestError as error:  # no plan has room: a result; that a plan does not hold is an error of ours
        return [row | {"state": f"{type(error).__name__}: {str(error)[:160]}"}]
    return [row | described(result)]


def described(result: Any) -> dict[str, Any]:
    """What a render took beside what its plan said."""
    made = result.plan
    peaks = {stage.stage: stage.peak_bytes for stage in result.stats}
    return {
        "state": "ran", "seconds": round(result.seconds, 2), "predicted_seconds": round(made.seconds, 2),
        "pflop": round(made.flops / 1e15, 4), "tflop_per_s": round(made.flops / result.seconds / 1e12, 2),
        "predicted_mib": round(made.peak_bytes / 2**20, 1), "peak_mib": round(max(peaks.values()) / 2**20, 1),
        "retries": sum(stage.retries for stage in result.stats), "offload": made.offload, "decode": made.decode.policy,
        "stages": " + ".join(f"{stats.stage} {stats.seconds:.1f} s" for stats in result.stats),
    }  # fmt: skip


def budget_pieces(suite: Suite) -> Iterator[Piece]:
    """Renders of 4K, and of 8K, with the card capped at 8 to 24 GB: none may run out of memory."""
    for side in suite.sides(4096, 8192):
        for family in FAMILIES:
            for budget in BUDGETS_GB:
                yield Piece(name=f"{family} {side} within {budget} GB", run=partial(rendered, suite, family, side, budget))


class capped:  # noqa: N801  used as a function
    """Within, the allocator of a card holds no more than so many bytes; on a CPU nothing is capped."""

    def __init__(self, device: torch.device, most: int | None) -> None:
        self.device, self.most = device, most

    def __enter__(self) -> None:
        if self.device.type == "cuda" and self.most is not None:
            torch.cuda.empty_cache()
            whole = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.most / whole), self.device)

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


def reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
