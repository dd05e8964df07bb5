"""Samplers on denoisers with known answers, and noise that belongs to the canvas."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from hires.errors import RequestError
from hires.samplers import SAMPLERS, CanvasNoise, canvas_noise, find_sampler
from hires.schedules import exponential
from hires.tiling.geometry import Box
from hires.types import SAMPLERS as NAMES

STD = 0.5


def gaussian(x: Tensor, sigma: float, cond: object) -> Tensor:
    """The exact denoiser of data drawn from N(0, STD^2)."""
    return x * STD**2 / (STD**2 + sigma**2)


def no_noise(step: int) -> Tensor:
    return torch.zeros(1, dtype=torch.float64)


def error_of(name: str, steps: int) -> float:
    """|sampled - exact| from sigma 10 to 0.05 for the probability-flow ODE, float64; the exact path scales with std."""
    sigmas = torch.logspace(1, math.log10(0.05), steps + 1, dtype=torch.float64)
    x = SAMPLERS[name](gaussian, torch.ones(1, 1, 1, 1, dtype=torch.float64), sigmas, None, no_noise)
    return abs(x.item() - math.sqrt((STD**2 + 0.05**2) / (STD**2 + 100)))


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    slope = math.log2(error_of(name, 64) / error_of(name, 128))
    assert order - 0.25 < slope < order + 0.6


def test_names_on_the_command_line_are_the_samplers_there_are() -> None:
    assert set(NAMES) == set(SAMPLERS)
    with pytest.raises(RequestError, match="did you mean 'euler'"):
        find_sampler("eular")


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_step_lands_on_the_denoised_estimate(name: str) -> None:
    x = torch.randn(1, 4, 5, 7)
    result = find_sampler(name)(gaussian, x, exponential(1, 0.1, 3.0), None, CanvasNoise(0, 0, Box(0, 0, 5, 7), 4))
    torch.testing.assert_close(result, gaussian(x, 3.0, None), rtol=0, atol=1e-6)


def test_the_ancestral_sampler_keeps_the_gaussian() -> None:
    box = Box(0, 0, 80, 150)
    noise = CanvasNoise(3, 0, box, 4)
    sigmas = exponential(400, 0.01, 20.0)
    start = noise(-1) * math.sqrt(400 + STD**2)
    result = SAMPLERS["euler_ancestral"](gaussian, start, sigmas, None, noise)
    assert abs(result.mean().item()) < 0.02
    assert abs(result.std().item() / STD - 1) < 0.03


def test_canvas_noise_is_standard_normal_and_differs_by_key() -> None:
    a = canvas_noise(1, 0, 0, Box(0, 0, 300, 301), 4)
    assert abs(a.mean()) < 0.01
    assert abs(a.std() - 1) < 0.01
    assert abs((a**4).mean() - 3) < 0.1
    for other in (
        canvas_noise(2, 0, 0, Box(0, 0, 300, 301), 4),
        canvas_noise(1, 1, 0, Box(0, 0, 300, 301), 4),
        canvas_noise(1, 0, 1, Box(0, 0, 300, 301), 4),
    ):
        assert abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(a[:, 1:].ravel(), a[:, :-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(a[..., 1:].ravel(), a[..., :-1].ravel())[0, 1]) < 0.01


def test_law_3_noise_belongs_to_the_canvas() -> None:
    """A crop of the noise is the noise of the crop, whatever the canvas, the thread count or the thread."""
    whole = canvas_noise(7, 2, 5, Box(0, 0, 64, 96), 4)
    part = canvas_noise(7, 2, 5, Box(13, 40, 20, 33), 4)
    assert np.array_equal(part, whole[:, 13:33, 40:73])
    before, drawn = torch.get_num_threads(), []
    try:
        torch.set_num_threads(1)
        worker = threading.Thread(target=lambda: drawn.append(CanvasNoise(7, 2, Box(0, 0, 64, 96), 4)(5)))
        worker.start()
        worker.join()
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(drawn[0][0].numpy(), whole)


def test_noise_is_the_same_in_every_version() -> None:
    """Pinned, so that a seed keeps its picture."""
    values = canvas_noise(42, 0, -1, Box(0, 0, 1, 2), 2).ravel()
    assert values.tolist() == pytest.approx(PINNED, abs=1e-6)


PINNED = [-0.029977617785334587, -0.44649115204811096, 1.0374354124069214, 0.289101779460907]
