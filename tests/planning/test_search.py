"""The plan against brute force over every way to run it, and against what its own stages allocate on fake tensors."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import replace

import pytest

from benchmarks.suites.planner import PIXART, network_bytes, vae_bytes
from hires.checkpoints.families import FAMILIES, UNetShape
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.noise_levels import vp_sigmas
from hires.devices.machines import described_card, host_device
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.kernels.attention_policies import Policy
from hires.options.render import RenderRequest
from hires.planning.costs.stages import CostModel
from hires.planning.plan import MemoryPlan, StagePlan
from hires.planning.planner import plan
from hires.planning.search import BATCHES, CPU_BATCHES, offloads
from hires.tiling.bands.memory import VaeShape
from hires.tiling.geometry import Size
from hires.units import BYTES_PER_ELEMENT, parse_bytes

UNET = UNetShape(channels=(320, 640, 1280), resnets=2, transformer_layers=(0, 2, 10), context_width=2048, latent_channels=4)
VAE = VaeShape(channels=(128, 256, 512, 512), resnets=2, latent_channels=4, mid_attention=True)
SIDES, BUDGETS = (2048, 4096, 8192), ("8GB", "12GB", "16GB", "24GB")


def full_size(demo: ModelSpec, name: str) -> ModelSpec:
    """The shapes and bytes of a full checkpoint, no weights."""
    facts = FAMILIES["cosxl" if name == "cosxl" else "pixart-sigma-1024"]
    common = {
        "name": name,
        "facts": facts,
        "native_px": 1024,
        "vae": VAE,
        "defaults": facts.defaults,
    }
    if name == "cosxl":
        shapes = {"network": UNET, "align_px": 32, "network_params": 2_567_460_000, "text_params": 817_720_000}
        return replace(demo, vae_params=83_650_000, **common, **shapes)  # type: ignore[arg-type]
    assert facts.betas is not None
    sigmas = vp_sigmas(*facts.betas)
    shapes = {"network": PIXART, "align_px": 16, "network_params": 610_860_000, "text_params": 4_762_310_656}
    levels = {"parameterisation": "eps", "vp_betas": facts.betas, "sigma_min": sigmas[0], "sigma_max": sigmas[-1]}
    return replace(demo, vae_params=83_650_000, **common, **shapes, **levels)  # type: ignore[arg-type]


def requests() -> list[tuple[str, RenderRequest, DeviceSpec]]:
    """Sizes, budgets, policies and machines of every kind."""
    found = []
    for model, side, budget in itertools.product(("cosxl", "pixart"), SIDES, ("3GB", "6GB", *BUDGETS)):
        found.append((model, RenderRequest(prompt="", size=Size(side, side)), described_card(parse_bytes(budget))))
    for model, policy, budget in itertools.product(("cosxl", "pixart"), ("npa", "kvpool:2"), ("8GB", "12GB", "24GB")):
        request = RenderRequest(prompt="", size=Size(2160, 3840), attention_policy=policy)
        found.append((model, request, described_card(parse_bytes(budget))))
    for budget in ("200MB", "1GB", "4GB"):
        found.append(("demo", RenderRequest(prompt="", size=Size(1500, 1000)), host_device(parse_bytes(budget))))
    slow_bus = replace(described_card(parse_bytes("6GB")), copy_bytes_per_second=1e9)
    return [*found, ("cosxl", RenderRequest(prompt="", size=Size(2048, 2048), guidance=1.0), slow_bus)]


REQUESTS = requests()
assert len(REQUESTS) >= 50


def brute_force(stages: tuple[StagePlan, ...], spec: ModelSpec, device: DeviceSpec, dtype: str) -> float:
    """The least seconds of every combination of place of the weights, batch of each stage and decode policy that fits."""
    best, model = float("inf"), CostModel(spec, device, dtype)
    for offload in offloads(device):
        moved = model.moving_seconds(stages, offload)
        per_stage = []
        for stage in stages:
            most = model.most_images(stage)
            batches = {min(batch, most) for batch in (CPU_BATCHES if device.kind == "cpu" else BATCHES)}
            per_stage.append([model.stage(stage, batch, offload) for batch in batches])
        for decode in model.decode_plans(stages[-1].canvas):
            last = model.decode(stages[-1].canvas, decode, offload)
            between = [model.enlarge(a.canvas, b, decode, offload) for a, b in itertools.pairwise(stages)]
            for combination in itertools.product(*per_stage):
                costs = [*combination, *between, last]
                if max(cost.peak_bytes for cost in costs) <= device.budget_bytes:
                    best = min(best, sum(cost.seconds for cost in costs) + moved)
    return best


@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_the_plan_is_the_best_of_all_ways(index: int, demo: ModelSpec) -> None:
    model, request, device = REQUESTS[index]
    spec = demo if model == "demo" else full_size(demo, model)
    begun = time.process_time()
    made = plan(request, spec, device)
    assert time.process_time() - begun < 0.5
    plain = tuple(replace(stage, batch=1) for stage in made.stages)
    least = brute_force(plain, spec, device, made.dtype)
    chosen = sum(cost.seconds for cost in made.costs if cost.stage != "text")
    assert least * 0.999 <= chosen <= least * 1.05
    assert made.peak_bytes <= device.budget_bytes


@functools.cache
def allocated(model: str, cells: Size, batch: int, policy: Policy, dtype: str) -> int:
    return network_bytes(model, cells, batch, policy, dtype)


@functools.cache
def decoded(canvas: Size, policy: str, band_rows: int, dtype: str, encode: bool) -> int:
    return vae_bytes(canvas.divided(8), policy, band_rows, dtype, encode)


def replayed(made: MemoryPlan, spec: ModelSpec, card: DeviceSpec, model: str) -> int:
    """The most bytes that any stage of a plan holds, its operators run on fake tensors."""
    peak, costs = 0, CostModel(spec, card, made.dtype)
    for stage in made.stages:
        weights = costs.weights(made.offload, "network")
        if made.offload == "layers":
            weights = 2 * max_layer_bytes(spec, made.dtype)
        canvas = 6 * 4 * spec.facts.latent_channels * stage.grid.canvas.area
        peak = max(peak, weights + canvas + allocated(model, stage.grid.tile, stage.batch, stage.attention, made.dtype))
    weights = costs.weights(made.offload, "vae")
    for encode in (False, True):
        peak = max(peak, weights + decoded(made.canvas, made.decode.policy, made.decode.band_rows, made.decode.dtype, encode))
    return peak


def max_layer_bytes(spec: ModelSpec, dtype: str) -> int:
    """The largest single layer: SDXL's gated feed-forward, PixArt's feed-forward, or a convolution of the up path."""
    largest = 8 * 1280 * 1280 if isinstance(spec.network, UNetShape) else 4 * 1152 * 1152
    largest = max(largest, 9 * 2560 * 1280) if isinstance(spec.network, UNetShape) else largest
    return largest * BYTES_PER_ELEMENT[dtype]


@pytest.mark.parametrize(
    ("model", "side", "budget", "policy"),
    [
        ("pixart", 2048, "12GB", "npa"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(("cosxl", "pixart"), SIDES, BUDGETS, (None, "npa"))
            if case != ("cosxl", 8192, "8GB", "npa")
        ),
    ],
)
def test_a_plan_replayed_never_exceeds_its_budget(
    model: str, side: int, budget: str, policy: str | None, demo: ModelSpec
) -> None:
    """Every size on every card has a plan; only CosXL's canvas of 8192 px in one piece needs more than 8 GB."""
    spec, card = full_size(demo, model), described_card(parse_bytes(budget))
    made = plan(RenderRequest(prompt="", size=Size(side, side), attention_policy=policy), spec, card)
    assert replayed(made, spec, card, model) <= made.peak_bytes <= card.budget_bytes


@pytest.mark.parametrize(("model", "side"), itertools.product(("cosxl", "pixart"), (4096, 8192)))
def test_little_is_computed_twice_on_24_gb(model: str, side: int, demo: ModelSpec) -> None:
    """The plan's FLOPs over those of the same stages and steps with memory without end."""
    spec, request = full_size(demo, model), RenderRequest(prompt="", size=Size(side, side))
    made, free = (plan(request, spec, described_card(budget)) for budget in (parse_bytes("24GB"), 10**14))
    assert [replace(s, batch=1) for s in made.stages] == [replace(s, batch=1) for s in free.stages]
    total, least = (sum(cost.flops for cost in p.costs) for p in (made, free))
    print(f"{model} {side}: {total / 1e15:.2f} PFLOP, {total / least:.3f} of unlimited memory; {made.offload}, {made.decode}")
    assert 1 <= total / least <= 1.3


def test_a_canvas_in_one_piece_that_does_not_fit_says_what_would(demo: ModelSpec) -> None:
    request = RenderRequest(prompt="", size=Size(8192, 8192), attention_policy="npa")
    with pytest.raises(BudgetError, match=r"`vram` \d+\.\dGB would do, or tiles: leave `attention_policy` out"):
        plan(request, full_size(demo, "cosxl"), described_card(parse_bytes("8GB")))
