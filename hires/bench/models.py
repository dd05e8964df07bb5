"""Measures the parts of a render, and renders, within the user's budget.

The suites vae, denoise and render of `hires bench`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hires.bench.row import DTYPES, BenchSetup, Row, name_of, resident_from_now
from hires.bench.timing import Timed, peak_flops
from hires.checkpoints.model import ModelSpec
from hires.devices.probe import probe
from hires.errors import RequestError
from hires.options.render import RenderRequest
from hires.pipelines.base import Runtime, Session
from hires.pipelines.progressive import attending
from hires.planning.costs.evaluations import estimates_per_step
from hires.planning.costs.flops import network_flops
from hires.planning.plan import MemoryPlan, StagePlan
from hires.planning.planner import plan
from hires.tiling.denoise import tiled
from hires.tiling.retry import Batcher
from hires.units import gib, parse_bytes


def vae_rows(setting: BenchSetup) -> Iterator[Row]:
    """The model's autoencoder: decode by every policy that fits, against the module itself where that fits; then encode."""
    from hires.models.loading import load_vae
    from hires.tiling.bands.storage import VAE_POLICIES

    vae = load_vae(setting.spec, setting.torch_dtype, setting.device)
    for size in setting.of("vae"):
        cells, generator = (size.height // 8, size.width // 8), torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, *cells, generator=generator).to(setting.device, setting.torch_dtype)
        picture = (torch.rand(1, 3, 8 * cells[0], 8 * cells[1], generator=generator) * 2 - 1).to(latents)
        for case, given in (("decode", latents), ("encode", picture)):
            first: tuple[str, Tensor] | None = None
            for policy in VAE_POLICIES:
                row, result = _vae_row(setting, vae, (case, policy, cells), given, first)
                first = (policy, result) if first is None and result is not None else first
                yield row


def _vae_row(
    setting: BenchSetup, vae: Any, what: tuple[str, str, tuple[int, int]], given: Tensor, first: tuple[str, Tensor] | None
) -> tuple[Row, Tensor | None]:
    """One policy beside the first that ran, PSNR over the span of that, and its result."""
    from hires.metrics.fidelity import psnr
    from hires.tiling.bands.storage import vae_decode_flops, vae_encode_flops
    from hires.tiling.vae import TiledVAE

    case, policy, cells = what
    encode, dtype = case == "encode", setting.torch_dtype
    tiled = TiledVAE(vae, policy=policy, band_px=None if policy == "whole" else 64)
    way = tiled.plan(*cells, encode=encode)[0]
    row = Row(
        suite="vae",
        case=case,
        way=policy,
        size=f"{8 * cells[1]}x{8 * cells[0]}",
        dtype=name_of(dtype),
        flops=(vae_encode_flops if encode else vae_decode_flops)(tiled.shape, *cells),
        peak_flops=peak_flops(setting.device, dtype),
        predicted_peak_bytes=way.peak_bytes + (way.host_bytes if setting.device.type == "cpu" else 0),
        taken=Timed(state=""),
    )
    if way.peak_bytes > setting.budget_bytes:
        return replace(row, taken=Timed(state=f"needs {gib(way.peak_bytes)}, the budget is {gib(setting.budget_bytes)}")), None

    def run() -> Tensor:
        return tiled.encode(given) if encode else tiled.decode(given)

    taken = setting.time(run)
    if taken.p50 is None:
        return replace(row, taken=taken), None
    result = run()
    row = replace(row, taken=taken, measured_peak_bytes=setting.peak_of(run))
    if first is None:
        return replace(row, measure="what others are held against"), result
    name, reference = first[0], first[1].float().cpu().numpy()
    same = min(psnr(result.float().cpu().numpy(), reference, float(np.ptp(reference))), 999.0)
    return replace(row, measure=f"PSNR dB to {name}", quality=same), result


def evaluation(session: Session, stage: StagePlan, x: Tensor) -> Callable[[int], Tensor]:
    """A guided evaluation of a stage's denoiser at its first noise level, for x (1, C, h, w), by the pictures at once."""

    def run(batch: int) -> Tensor:
        network = session.denoiser(attending(stage.attention, None))
        denoise, cond = session.guided(tiled(network, stage.grid, batch=Batcher(batch)), stage)
        result: Tensor = denoise(x, stage.sigma_start, cond)
        return result

    return run


def evaluation_flops(spec: ModelSpec, stage: StagePlan) -> float:
    """Of such an evaluation."""
    tile = stage.grid.tile
    one = network_flops(spec.network, tile.height, tile.width, policy=stage.attention)
    return one * stage.grid.count * estimates_per_step(stage, spec)


def denoise_rows(setting: BenchSetup) -> Iterator[Row]:
    """One evaluation of the guided denoiser on the canvas, in tiles and by neighbourhood attention."""
    budget = None if setting.vram is None else parse_bytes(setting.vram)
    for size in setting.of("denoise"):
        for way, policy in (("tiles", None), ("npa", "npa")):
            request = RenderRequest(
                prompt="a lake",
                size=size,
                model=setting.model,
                parts=setting.parts,
                strategy="tiled" if policy is None else "direct",
                steps=2,
                dtype=setting.dtype,
                attention_policy=policy,
            )
            try:
                planned = plan(request, setting.spec, probe(setting.device, budget))
            except RequestError as error:
                state = f"refused: {error}"
                yield Row(suite="denoise", case=setting.spec.name, way=way, size=str(size), taken=Timed(state=state))
                continue
            yield _denoise_row(setting, way, request, planned)


def _denoise_row(setting: BenchSetup, way: str, request: RenderRequest, planned: MemoryPlan) -> Row:
    """The last stage of a plan, evaluated once, and how far another batch differs from it."""
    from hires.pipelines.load import load_session

    spec, stage = setting.spec, planned.stages[-1]
    session = load_session(request, planned, spec, Runtime.of(request, planned, setting.device))
    session.weights.ready("network")
    x = _start(spec, stage).to(setting.device)
    held = torch.cuda.memory_allocated(setting.device) if setting.device.type == "cuda" else 0  # plans count weights
    run = evaluation(session, stage, x)
    row = Row(
        suite="denoise",
        case=spec.name,
        way=f"{way}, {stage.grid.count} of {stage.grid.tile}, batch {stage.batch}",
        size=str(request.size),
        dtype=planned.dtype,
        flops=evaluation_flops(spec, stage),
        peak_flops=peak_flops(setting.device, DTYPES[planned.dtype]),
        predicted_peak_bytes=next(cost for cost in planned.costs if cost.stage == stage.name).peak_bytes,
        taken=setting.time(partial(run, stage.batch)),
    )
    if row.taken.p50 is None:
        return row
    peak = setting.peak_of(partial(run, stage.batch))
    row = replace(row, measured_peak_bytes=None if peak is None else peak + held)
    if stage.grid.count * estimates_per_step(stage, spec) == 1:
        return row
    other = 1 if stage.batch > 1 else 2
    with torch.inference_mode():
        difference = float((run(stage.batch) - run(other)).abs().max() / x.abs().max())
    return replace(row, measure=f"max difference to batch {other}", quality=difference)


def _start(spec: ModelSpec, stage: StagePlan) -> Tensor:
    """Noise (1, C, h, w) at the stage's first noise level."""
    canvas, generator = stage.grid.canvas, torch.Generator().manual_seed(0)
    return torch.randn(1, spec.facts.latent_channels, canvas.height, canvas.width, generator=generator) * stage.sigma_start


def render_rows(setting: BenchSetup) -> Iterator[Row]:
    """Whole renders by each preset: seconds, predicted against measured bytes, and the seam score of the last stage's tiles."""
    from hires.engine.engine import render
    from hires.images.boxes import luma
    from hires.metrics.seams import seam_lines, seam_score
    from hires.options.render import PRESETS

    for size in setting.of("render"):
        for preset in ("fast",) if setting.quick else PRESETS:
            before = resident_from_now() if setting.device.type == "cpu" else 0
            begun = time.perf_counter()
            result = render(
                "a sun on the right over green mountains and a lake at dusk",
                size=size,
                model=setting.model,
                parts=setting.parts,
                preset=preset,
                device=str(setting.device),
                vram=setting.vram,
                dtype=setting.dtype,
            )
            taken = time.perf_counter() - begun
            grid = result.plan.latent_grid
            rows, cols = seam_lines(grid, 8)
            rows, cols = (
                tuple(line for line in lines if line < extent) for lines, extent in ((rows, size.height), (cols, size.width))
            )
            picture = luma(result.pixels.astype(np.float32) / 255)
            dtype = DTYPES[result.plan.dtype]
            spec = setting.spec
            parameters = spec.network_params + spec.text_params + spec.vae_params
            weights = parameters * dtype.itemsize if setting.device.type == "cpu" else 0  # a CPU's plan is without them
            measured = None if before is None else max(stage.peak_bytes for stage in result.stats) - before - weights
            yield Row(
                suite="render",
                case=result.plan.model,
                way=f"{preset}, {result.plan.strategy}",
                size=str(size),
                dtype=result.plan.dtype,
                taken=Timed(p20=taken, p50=taken, p80=taken, repeats=1),
                flops=result.plan.flops,
                peak_flops=peak_flops(setting.device, dtype),
                predicted_peak_bytes=result.plan.peak_bytes,
                measured_peak_bytes=measured,
                measure="seam score",
                quality=seam_score(picture, rows, cols, cell_px=8),
            )
