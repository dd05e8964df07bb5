"""Samplers on denoisers with known answers, against k-diffusion's numbers and diffusers' schedulers."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hires.checkpoints.noise_levels import vp_sigmas
from hires.errors import RequestError
from hires.sampling import registry
from hires.sampling.dpm_solver import AdaptiveSteps
from hires.sampling.noise import CanvasNoise, StepNoise
from hires.sampling.samplers import SAMPLERS, exponential, find_sampler, karras
from hires.sampling.single_step import tcd_level
from hires.tiling.denoise import tiled
from hires.tiling.geometry import Box, Size, make_grid
from tests.support.mixture import mixture

MEAN, STD = 1.0, 0.5
RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "k_diffusion.npz")
TABLE = vp_sigmas("scaled_linear", 0.00085, 0.012)
STOCHASTIC = [name for name, facts in registry.SAMPLER_FACTS.items() if facts.stochastic and name not in ("lcm", "tcd")]
OPTIONS: dict[str, dict[str, Any]] = {
    "lms+order": {"order": 2},
    "dpm_adaptive+order": {"steps": AdaptiveSteps(order=2)},
    "dpm_adaptive+pid": {"steps": AdaptiveSteps(rtol=0.02, atol=0.002, pcoeff=0.2, icoeff=0.7, dcoeff=0.1)},
    "dpm_adaptive+eta": {"steps": AdaptiveSteps(rtol=0.5, atol=0.2)},
}
NOISE: dict[str, dict[str, float]] = {
    "churn": {"s_churn": 4.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003},
    "eta": {"eta": 0.6, "s_noise": 1.1},
}


def gaussian(x: Tensor, sigma: float, cond: object = None, mean: float = 0.0) -> Tensor:
    """The exact denoiser of data drawn from N(mean, STD^2)."""
    return mean + (x - mean) * (STD**2 / (STD**2 + sigma**2))


def no_noise(step: int, part: int = 0) -> Tensor:
    return torch.zeros(1, dtype=torch.float64)


def without_noise(name: str) -> StepNoise:
    """eta 0 for the samplers whose own eta is 1; the others keep their own."""
    return StepNoise(source=no_noise, eta=0.0 if name in STOCHASTIC else None)


def recorded_runs() -> list[str]:
    return [key for key in RECORDED.files if "/" in key and not key.endswith("sigmas")]


def test_every_sampler_of_k_diffusion_is_recorded_on_both_schedules() -> None:
    runs = {tuple(key.partition("+")[0].split("/")) for key in recorded_runs()}
    assert {("karras", "10", "dpm_adaptive"), ("karras", "10", "dpm_fast"), ("karras", "20", "dpm_fast")} < runs
    for name in set(SAMPLERS) - {"restart", "unipc", "ddim", "lcm", "tcd", "dpm_fast", "dpm_adaptive"}:
        assert {(schedule, steps, name) for schedule in ("karras", "exponential") for steps in ("10", "20")} < runs


@pytest.mark.parametrize("key", recorded_runs())
def test_equals_k_diffusion_in_float64(key: str) -> None:
    """The same start, sigmas and noise: fixtures/README.md tells how the numbers were made."""
    schedule, steps, run = key.split("/")
    name, _, option = run.partition("+")
    recorded = torch.from_numpy(RECORDED["noise"])
    result = SAMPLERS[name](
        mixture,
        torch.from_numpy(RECORDED["start"]) * 15.0,
        torch.from_numpy(RECORDED[f"{schedule}/{steps}/sigmas"]),
        None,
        StepNoise(source=lambda step, part=0: recorded[step, part], **NOISE.get(option, {})),
        **OPTIONS.get(run, {}),
    )
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), RECORDED[key], rtol=0, atol=1e-12)


def error_of(name: str, steps: int, options: dict[str, Any], high: float = 1e3) -> float:
    """|sampled - exact| / exact from sigma `high` to 0.05 for the probability-flow ODE; the exact path scales with std."""
    sigmas = torch.logspace(math.log10(high), math.log10(0.05), steps + 1, dtype=torch.float64)
    x = SAMPLERS[name](gaussian, torch.ones(1, 1, 1, 1, dtype=torch.float64), sigmas, None, without_noise(name), **options)
    return abs(x.item() / math.sqrt((STD**2 + 0.05**2) / (STD**2 + high**2)) - 1)


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1),
        ("ddim", {}, 1),
        ("heun", {}, 2),
        ("dpm_2", {}, 2),
        ("dpm_2_ancestral", {}, 2),
        ("dpmpp_2s_ancestral", {}, 2),
        ("dpmpp_sde", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_sde", {}, 2),
        ("dpmpp_2m_sde_heun", {}, 2),
        ("dpmpp_3m_sde", {}, 2),
        ("dpmpp_3m_sde", {"curvature": 2.0}, 3),
        ("lms", {"order": 2}, 2),
        ("lms", {"order": 4}, 4),
        ("dpm_fast", {}, 3),
    ],
)
def test_order_of_convergence(name: str, options: dict[str, Any], order: int) -> None:
    """From a level so high that the first steps, of low order in multistep samplers, make no error."""
    few, many = (122, 245) if name == "dpm_fast" else (128, 256)  # 3k + 2: no step of order 1 at the end
    slope = math.log(error_of(name, few, options) / error_of(name, many, options)) / math.log(many / few)
    assert order - 0.25 < slope < order + 0.6


def test_the_third_order_term_of_3m_as_published_more_than_halves_the_error_of_2m() -> None:
    for steps in (128, 256):
        assert error_of("dpmpp_3m_sde", steps, {}) < 0.45 * error_of("dpmpp_2m", steps, {})


def test_unipc_has_order_3() -> None:
    """On the mixture, against 1500 steps of LMS: the errors on a Gaussian change sign between step counts."""

    def run(name: str, steps: int) -> Tensor:
        sigmas = torch.logspace(math.log10(40), math.log10(0.02), steps + 1, dtype=torch.float64)
        x = torch.from_numpy(RECORDED["start"]) * 40
        return SAMPLERS[name](mixture, x, sigmas, None, without_noise(name))

    exact = run("lms", 1500)
    errors = [(run("unipc", steps) - exact).abs().max().item() for steps in (64, 128, 256)]
    assert 2.75 < math.log2(errors[0] / errors[1]) < 3.6
    assert 2.75 < math.log2(errors[1] / errors[2]) < 3.6


def test_names_on_the_command_line_are_the_samplers_there_are() -> None:
    assert list(registry.SAMPLER_FACTS) == list(SAMPLERS)
    assert find_sampler("DPM++ 2M Karras") is SAMPLERS["dpmpp_2m"]
    with pytest.raises(RequestError, match="did you mean 'euler'"):
        find_sampler("eular")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_one_step_lands_on_the_denoised_estimate(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(1, 4, 5, 7, dtype=dtype)
    noise = StepNoise(source=CanvasNoise(0, 0, Box(0, 0, 5, 7), 4))
    result = find_sampler(name)(gaussian, x, exponential(1, 0.1, 3.0), None, noise)
    assert result.dtype == dtype
    torch.testing.assert_close(result, gaussian(x, 3.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 21, 36])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_evaluations_and_steps_are_as_the_catalogue_says(name: str, steps: int) -> None:
    counted, reported = [], []

    def counting(x: Tensor, sigma: float, cond: object) -> Tensor:
        counted.append(sigma)
        return mixture(x, sigma)

    noise = CanvasNoise(0, 0, Box(0, 0, 5, 7), 2)
    result = SAMPLERS[name](
        counting,
        noise(-1) * 20,
        karras(steps, 0.02, 20.0),
        None,
        StepNoise(source=noise, table=TABLE),
        lambda i, x0: reported.append(i),
    )
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert reported == list(range(len(reported)))
    if registry.SAMPLER_FACTS[name].known:
        assert len(counted) == registry.evaluations(name, steps)
        assert len(reported) == steps
    else:
        assert len(counted) <= registry.evaluations(name, steps)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_keep_the_gaussian(name: str) -> None:
    """Mean and variance of N(1, 0.5^2) within 2 %, from pure noise, on 24 000 cells."""
    noise = CanvasNoise(3, 0, Box(0, 0, 60, 100), 4)
    steps = 800 if name == "euler_ancestral" else 60  # of order 1
    start = MEAN + noise(-1) * math.sqrt(400 + STD**2)
    result = SAMPLERS[name](partial(gaussian, mean=MEAN), start, karras(steps, 0.01, 20.0), None, StepNoise(source=noise))
    assert result.mean().item() == pytest.approx(MEAN, rel=0.02)
    assert result.var().item() == pytest.approx(STD**2, rel=0.02)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_law_2_a_pointwise_denoiser_gives_the_same_tiled_and_whole(name: str) -> None:
    noise = CanvasNoise(3, 0, Box(0, 0, 23, 37), 2)
    sigmas = karras(21, 0.03, 15.0)
    results = [
        SAMPLERS[name](denoise, noise(-1) * 15, sigmas, None, StepNoise(source=noise, table=TABLE))
        for denoise in (mixture, tiled(mixture, make_grid(Size(23, 37), Size(10, 14), 4), batch=3))
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("levels", "eta", "wanted"),
    [
        ((999, 759), 0.3, 2.3200790315),
        ((999, 759), None, 2.3200790315),
        ((999, 759), 0.0, 2.8740909075),
        ((999, 759), 1.0, 2.1939547668),
        ((259, 0), 0.3, 1.0933638876),
    ],
)
def test_tcd_by_the_reference_numbers(levels: tuple[int, int], eta: float | None, wanted: float) -> None:
    """x 1, network 0.2, noise -0.5, all in the scale of the variance-preserving process; float64."""
    first, last = (TABLE[time] for time in levels)
    sigmas = torch.tensor([first, last], dtype=torch.float64)
    x = torch.full((1, 1, 1, 1), math.sqrt(first**2 + 1), dtype=torch.float64)
    noise = StepNoise(source=lambda step, part=0: torch.tensor(-0.5, dtype=torch.float64), eta=eta, table=TABLE)
    result = SAMPLERS["tcd"](lambda x, sigma, cond: x - sigma * 0.2, x, sigmas, None, noise)
    assert result.item() / math.sqrt(last**2 + 1) == pytest.approx(wanted, abs=1e-9)


def test_tcd_counts_the_timestep_that_a_float32_sigma_was_made_of() -> None:
    for time in (760, 500, 20, 10):  # (1 - 0.3) t is whole: a timestep below would be taken for a sigma a rounding too low
        level = torch.tensor(TABLE[time]).item()
        assert tcd_level(TABLE, level, 0.3) == TABLE[math.floor(0.7 * time)]
    with pytest.raises(RequestError, match="tcd counts a checkpoint's timesteps"):
        tcd_level(None, 1.0, 0.3)
