"""A guided, tiled, progressive render against plain loops in float64, and what a stage's policy costs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hires
from hires.checkpoints.model import ModelSpec
from hires.errors import RequestError
from hires.kernels.attention_policies import Attending, everywhere
from hires.models.offload import Weights
from hires.options.stage import GuidePlan
from hires.pipelines import progressive
from hires.pipelines.base import guidance_of
from hires.planning.plan import MemoryPlan, StagePlan
from hires.protocols import Denoiser
from hires.sampling.conditioning import Conditioning
from hires.sampling.guidance import guided
from hires.sampling.noise import canvas_noise
from hires.tiling.geometry import Box, Size, make_grid

PROMPT, NEGATIVE = (Conditioning(tokens=torch.full((1, 2, 3), value)) for value in (0.4, -0.3))


def network(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
    """Not linear, not pointwise (every cell sees its neighbours, its tile's mean and the prompt), at home in any dtype."""
    push = cond.tokens.to(x).mean((1, 2))[:, None, None, None]
    around = x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, -2)
    return torch.tanh(around / (1 + sigma) + push) + 0.2 * x.mean((-2, -1), keepdim=True)


class Family:
    """The least that stages need; counts the pictures that its network evaluates."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec, self.device, self.tiny, self.pictures = spec, torch.device("cpu"), None, 0
        self.vae = SimpleNamespace(retries=0, recomputed=0)
        self.guard = SimpleNamespace(redone=0)
        self.weights = Weights(torch.nn.Identity(), torch.nn.Identity(), self.device)

    def denoiser(self, policy: Attending = everywhere) -> Denoiser:
        def counted(x: Tensor, sigma: float, cond: Conditioning) -> Tensor:
            self.pictures += len(x)
            return network(x, sigma, cond)

        return counted

    def guided(self, on_canvas: Denoiser, stage: StagePlan) -> tuple[Denoiser, Conditioning]:
        return guided(on_canvas, NEGATIVE, guidance_of(stage)), PROMPT

    def calls(self, stage: StagePlan) -> int:
        return 1

    def preview(self, latents: Tensor) -> None:
        return None


def made(**changes: object) -> MemoryPlan:
    """Two stages: 12 x 16 cells whole, then 24 x 32 in tiles of 16 x 16, guided."""
    plan = hires.plan("", size="256x256", device="cpu")
    stage = replace(plan.stages[0], sampler="euler", schedule="karras", steps=4, sigma_start=20.0, guidance=2.5)
    small, large = Size(12, 16), Size(24, 32)
    base = replace(stage, canvas=small.times(8), grid=make_grid(small, small, 0))
    refine = replace(
        stage,
        name="refine 1",
        canvas=large.times(8),
        grid=make_grid(large, Size(16, 16), 5),
        sigma_start=1.5,
        enlarger="latent",
        **changes,  # type: ignore[arg-type]
    )
    return replace(plan, stages=(base, refine))


def guided_loop(x: Tensor, sigma: float, low: float, high: float) -> Tensor:
    with_prompt, without = network(x, sigma, PROMPT), network(x, sigma, NEGATIVE)
    delta = with_prompt - without
    return without + low * low_band(delta, 0.25) + high * (delta - low_band(delta, 0.25))


def low_band(x: Tensor, cutoff: float) -> Tensor:
    h, w = x.shape[-2:]
    twice = torch.cat([x, x.flip(-2)], -2)
    twice = torch.cat([twice, twice.flip(-1)], -1)
    radius = torch.hypot(torch.fft.fftfreq(2 * h)[:, None].double(), torch.fft.fftfreq(2 * w)[None, :].double())
    return torch.fft.ifft2(torch.fft.fft2(twice) * (radius <= cutoff)).real[..., :h, :w]


def fused(x: Tensor, sigma: float, cond: Conditioning, plan: StagePlan) -> Tensor:
    total, weight = torch.zeros_like(x), torch.zeros(x.shape[-2:]).double()
    shape = torch.sin(math.pi * (torch.arange(16).double() + 0.5) / 16) ** 2 + 1e-3
    for top in plan.grid.tops:
        for left in plan.grid.lefts:
            tile = (..., slice(top, top + 16), slice(left, left + 16))
            total[tile] += shape[:, None] * shape * network(x[tile], sigma, cond)
            weight[tile] += shape[:, None] * shape
    return total / weight


def test_a_guided_tiled_progressive_render_is_plain_loops(demo: ModelSpec) -> None:
    guides = (GuidePlan(cutoff=0.2), GuidePlan(kind="pull"))
    plan = made(guides=guides, guidance_high=4.0, guidance_interval=(0.1, 1.0))
    found = progressive.run(Family(demo), plan, 7, lambda event: None).latents

    def unit(stage: int, h: int, w: int) -> Tensor:
        channels = demo.facts.latent_channels
        return torch.from_numpy(canvas_noise(7, stage, -1, Box(0, 0, h, w), channels))[None].double()

    levels = [progressive.stage_sigmas(demo, stage).double().tolist() for stage in plan.stages]
    x = unit(0, 12, 16) * math.sqrt(20.0**2 + 1)
    for sigma, following in itertools.pairwise(levels[0]):
        estimate = guided_loop(x, sigma, 2.5, 2.5)
        x = x + (x - estimate) * (following - sigma) / sigma
    rows, cols = (keys(n) for n in (12, 16))
    before = rows @ x @ cols.T
    first = levels[1][0]
    x = before + unit(1, 24, 32) * first
    for sigma, following in itertools.pairwise(levels[1]):
        estimate = fused(x, sigma, PROMPT, plan.stages[1])
        if 0.1 < sigma <= 1.0:
            without = fused(x, sigma, NEGATIVE, plan.stages[1])
            delta = estimate - without
            estimate = without + 2.5 * low_band(delta, 0.25) + 4.0 * (delta - low_band(delta, 0.25))
        a = sigma**2 / (1 + sigma**2) / (first**2 / (1 + first**2))
        estimate = estimate + a * (low_band(before, 0.2) - low_band(estimate, 0.2))
        estimate = estimate + (sigma / first) ** 4 * (before - estimate)
        x = x + (x - estimate) * (following - sigma) / sigma
    torch.testing.assert_close(found.double(), x, rtol=0, atol=1e-5)
    plain = progressive.run(Family(demo), made(), 7, lambda event: None).latents
    assert (plain.double() - x).abs().max() > 0.05  # the guides do something


def keys(n: int) -> Tensor:
    """Keys' bicubic to twice the length, (2n, n): taps -9/128, 111/128, 29/128, -3/128 and their mirror, edges repeated."""
    matrix = torch.zeros(2 * n, n, dtype=torch.float64)
    taps = torch.tensor([-9.0, 111.0, 29.0, -3.0]).double() / 128
    for i in range(n):
        for k in range(4):
            matrix[2 * i + 1, min(max(i - 1 + k, 0), n - 1)] += taps[k]
            matrix[2 * i, min(max(i + 1 - k, 0), n - 1)] += taps[k]
    return matrix


def test_an_interval_saves_the_estimates_outside_it(demo: ModelSpec) -> None:
    whole, part = Family(demo), Family(demo)
    progressive.run(whole, made(), 3, lambda event: None)
    plan = made(guidance_interval=(0.1, 1.0))
    progressive.run(part, plan, 3, lambda event: None)
    outside = [s for s in progressive.stage_sigmas(demo, plan.stages[1])[:-1].tolist() if not 0.1 < s <= 1.0]
    assert outside
    assert whole.pictures - part.pictures == len(outside) * plan.stages[1].grid.count


def test_a_stage_without_guides_is_what_it_was(demo: ModelSpec) -> None:
    """No guide, no policy beyond the scale: classifier-free guidance, and for scale 1 one estimate."""
    family = Family(demo)
    plan = made(guidance=1.0)
    progressive.run(family, plan, 3, lambda event: None)
    assert family.pictures == 4 * 2 + 4 * plan.stages[1].grid.count


def test_a_guide_is_in_the_plan_and_out_of_range_refused() -> None:
    assert "held below 0.2 cycles per cell" in made(guides=(GuidePlan(cutoff=0.2),)).explain()
    for facts in ({"kind": "push"}, {"cutoff": 0.0}, {"cutoff": 0.6}):
        with pytest.raises(RequestError):
            GuidePlan(**facts)  # type: ignore[arg-type]
