"""A guided, tiled, progressive render of tiny random checkpoints against plain loops over diffusers' own modules."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hires.checkpoints.model import ModelSpec, sigma_table
from hires.devices.machines import host_device
from hires.engine.requests import spec_for
from hires.models.text_encoders import encode_prompts
from hires.options.render import RenderRequest
from hires.options.stage_text import parse_stage
from hires.pipelines import load, progressive
from hires.pipelines.base import Runtime
from hires.planning import planner
from hires.planning.plan import MemoryPlan, StagePlan
from hires.sampling.noise import canvas_noise
from hires.tiling.geometry import Box, Size
from hires.units import parse_bytes
from tests.pipelines.test_guided_stages import keys, low_band
from tests.pipelines.test_pixart_sigma import family
from tests.support import checkpoints
from tests.support.tiny_pixart import prompt, spec, transformer

CPU = torch.device("cpu")
SIZE = Size(192, 256)
STAGES = (parse_stage("128x96,steps=3,sigma=3"), parse_stage("256x192"))  # at sigma 120 float32 has no five digits
RELAY = "steps=4,tile=128,overlap=48,guide=structure:0.2+pull,guidance=3,high=5,interval=0.1:0.9"
Estimate = Callable[[Tensor, float, bool, Size, tuple[int, int]], Tensor]
"""Of a tile at (top, left) in cells of a canvas in pixels, with the prompt or without."""


def test_cosxl(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "cosxl", "file")
    request = RenderRequest(
        prompt="a red sun", size=SIZE, model=str(made.path), parts=None if made.parts is None else str(made.parts),
        guidance=4.0, sampler="euler", stages=STAGES, relay=parse_stage(RELAY), seed=2,
    )  # fmt: skip
    of = replace(spec_for(request), native_px=128)
    plan = planned(request, of)
    ours = load.load_session(request, plan, of, Runtime.of(request, plan, CPU))
    words = encode_prompts(of, ["a red sun", ""], torch.float32, CPU)
    unet: Any = copy.deepcopy(made.network)

    def estimate(x: Tensor, sigma: float, prompted: bool, canvas: Size, place: tuple[int, int]) -> Tensor:
        word = words[0 if prompted else 1]
        h, w = canvas.height, canvas.width
        ids = torch.tensor([[h, w, 8 * place[0], 8 * place[1], h, w]]).float()
        scale = 1 / math.sqrt(sigma**2 + 1)
        found = unet(
            (x * scale).float(), torch.tensor([0.25 * math.log(sigma)]), encoder_hidden_states=word.tokens,
            added_cond_kwargs={"text_embeds": word.pooled, "time_ids": ids}, return_dict=False,
        )[0]  # fmt: skip
        return x * scale**2 - found.double() * (sigma * scale)

    same(ours, plan, Loop(of, plan, made.vae, estimate))


def test_pixart_sigma(demo: ModelSpec) -> None:
    """Every tile a picture of its own, as diffusers' module has it."""
    of, network = spec(demo, "pixart-sigma-256"), transformer(16, 0.25)
    of = replace(of, native_px=128)
    request = RenderRequest(
        prompt="",
        size=SIZE,
        guidance=4.0,
        sampler="euler",
        schedule="linspace",
        stages=STAGES,
        relay=parse_stage(RELAY),
        seed=2,
    )
    plan, module = planned(request, of), copy.deepcopy(network)
    ours = family(of, network, 300, position_mode="local")
    words = [prompt(9, 300, 1), prompt(1, 300, 2)]
    table = np.log(sigma_table(of) or ())

    def estimate(x: Tensor, sigma: float, prompted: bool, canvas: Size, place: tuple[int, int]) -> Tensor:
        word = words[0 if prompted else 1]
        time = float(np.interp(math.log(sigma), table, np.arange(len(table))))
        found = module(
            (x / math.sqrt(sigma**2 + 1)).float(), encoder_hidden_states=word.tokens, timestep=torch.tensor([time]),
            encoder_attention_mask=word.mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return x - found[:, :4].double() * sigma

    same(ours, plan, Loop(of, plan, ours.vae.vae, estimate))


def planned(request: RenderRequest, of: ModelSpec) -> MemoryPlan:
    """A base picture in one piece, then the canvas in tiles."""
    plan = planner.plan(request, of, host_device(parse_bytes("4GiB")))
    assert [stage.grid.count for stage in plan.stages] == [1, 6]
    assert plan.stages[0].canvas.area < plan.stages[1].canvas.area == SIZE.area
    return plan


def same(ours: Any, plan: MemoryPlan, loop: Loop) -> None:
    """Within 1e-5 of the largest value; and what guides the picture changes it by far more."""
    found = progressive.run(ours, plan, 2, lambda event: None).latents.double()
    with torch.inference_mode():
        expected = loop.run(2)
    most = float(expected.abs().max())
    assert most > 0.1 and (found - expected).abs().max() <= 1e-5 * max(1.0, most)
    stages = tuple(replace(s, guides=(), guidance_high=None, guidance_interval=None) for s in plan.stages)
    plain = progressive.run(ours, replace(plan, stages=stages), 2, lambda event: None).latents
    assert (plain - expected).abs().max() > 1e-3 * most


class Loop:
    """Two stages written out: Euler in float64, hann tiles, guidance split at 0.25, guides, the way through pixels."""

    def __init__(self, of: ModelSpec, plan: MemoryPlan, vae: Any, estimate: Estimate) -> None:
        self.of, self.plan, self.vae, self.estimate = of, plan, vae, estimate

    def run(self, seed: int) -> Tensor:
        base, refine = self.plan.stages
        levels = [progressive.stage_sigmas(self.of, stage).double().tolist() for stage in (base, refine)]
        x = self.noise(seed, 0, base) * math.sqrt(base.sigma_start**2 + 1)
        for sigma, following in itertools.pairwise(levels[0]):
            whole = [self.estimate(x, sigma, prompted, base.canvas, (0, 0)) for prompted in (True, False)]
            x = x + (x - (whole[1] + 4.0 * (whole[0] - whole[1]))) * (following - sigma) / sigma
        before, first = self.enlarged(x, refine), levels[1][0]
        x = before + self.noise(seed, 1, refine) * first
        for sigma, following in itertools.pairwise(levels[1]):
            found = self.guided(x, sigma, refine)
            a = sigma**2 / (1 + sigma**2) / (first**2 / (1 + first**2))
            found = found + a * (low_band(before, 0.2) - low_band(found, 0.2))
            found = found + (sigma / first) ** 4 * (before - found)
            x = x + (x - found) * (following - sigma) / sigma
        return x

    def guided(self, x: Tensor, sigma: float, stage: StagePlan) -> Tensor:
        found = self.fused(x, sigma, True, stage)
        if not 0.1 < sigma <= 0.9:
            return found
        without = self.fused(x, sigma, False, stage)
        delta = found - without
        low = low_band(delta, 0.25)
        return without + 3.0 * low + 5.0 * (delta - low)

    def fused(self, x: Tensor, sigma: float, prompted: bool, stage: StagePlan) -> Tensor:
        total, weights = torch.zeros_like(x), torch.zeros(x.shape[-2:]).double()
        for top, left, tile in tiles(stage):
            shape = [torch.sin(math.pi * (torch.arange(n).double() + 0.5) / n) ** 2 + 1e-3 for n in tile]
            window = shape[0][:, None] * shape[1]
            part = (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
            total[part] += window * self.estimate(x[part], sigma, prompted, stage.canvas, (top, left))
            weights[part] += window
        return total / weights

    def enlarged(self, x: Tensor, stage: StagePlan) -> Tensor:
        scale = self.of.latent_scale
        picture = self.vae.decode((x / scale).float()).sample
        rows, cols = (keys(n) for n in picture.shape[-2:])
        larger = (rows @ picture.double() @ cols.T).float()
        return self.vae.encode(larger).latent_dist.mean.double() * scale

    def noise(self, seed: int, index: int, stage: StagePlan) -> Tensor:
        h, w = stage.grid.canvas.height, stage.grid.canvas.width
        return torch.from_numpy(canvas_noise(seed, index, -1, Box(0, 0, h, w), 4))[None].double()


def tiles(stage: StagePlan) -> Iterator[tuple[int, int, tuple[int, int]]]:
    for top, left in itertools.product(stage.grid.tops, stage.grid.lefts):
        yield top, left, (stage.grid.tile.height, stage.grid.tile.width)
