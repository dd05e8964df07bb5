from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hires.checkpoints.noise_levels import vp_sigmas
from hires.errors import RequestError
from hires.sampling import registry
from hires.sampling.samplers import (
    SCHEDULES,
    cosine,
    exponential,
    find_schedule,
    karras,
    make_sigmas,
    polyexponential,
    strength_sigmas,
)
from hires.sampling.schedules import beta_quantiles

TABLE = vp_sigmas("scaled_linear", 0.00085, 0.012)
LOW, HIGH = TABLE[0], TABLE[-1]


def timesteps(name: str, steps: int, top: float = HIGH) -> list[int]:
    """The timesteps whose sigmas a schedule has; they must be whole."""
    sigmas = SCHEDULES[name](steps, LOW, top, TABLE).tolist()
    assert sigmas[-1] == 0
    places = np.interp(np.log(sigmas[:-1]), np.log(TABLE), np.arange(1000))
    assert places == pytest.approx(places.round(), abs=1e-3)
    return [int(place) for place in places.round()]


def test_exponential_is_the_published_cosxl_table() -> None:
    sigmas = exponential(42, 0.002, 120.0).tolist()
    assert sigmas[:4] == pytest.approx([120, 91.76, 70.16, 53.65], rel=1e-4)
    assert [round(sigma, 4) for sigma in sigmas[-4:]] == [0.0034, 0.0026, 0.0020, 0]
    steps = np.diff(np.log(sigmas[:-1]))
    assert steps == pytest.approx(-math.log(60000) / 41, rel=1e-4)
    assert len(sigmas) == 43
    assert sum(s > 14.6 for s in sigmas) == 8
    assert sum(s < 0.03 for s in sigmas[:-1]) == 11


def test_karras_ends_where_it_should() -> None:
    sigmas = karras(10, 0.03, 14.6).tolist()
    assert sigmas[0] == pytest.approx(14.6)
    assert sigmas[-2] == pytest.approx(0.03)
    assert sigmas[-1] == 0
    steps = -np.diff(np.log(karras(42, 0.002, 120.0).tolist()[:-1]))
    assert steps[[0, -1]] == pytest.approx([0.1366, 0.6228], abs=1e-4)


@pytest.mark.parametrize("steps", [20, 42])
def test_the_edm_schedules_are_those_of_diffusers(steps: int) -> None:
    from diffusers import EDMEulerScheduler

    for name in ("exponential", "karras"):
        scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, sigma_schedule=name)
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(SCHEDULES[name](steps, 0.002, 120.0), scheduler.sigmas, rtol=1e-5, atol=0)


def test_polyexponential_and_cosine_by_their_formulas() -> None:
    assert polyexponential(17, 0.03, 14.6).tolist() == pytest.approx(exponential(17, 0.03, 14.6).tolist(), rel=1e-6)
    assert polyexponential(3, 0.01, 100.0, rho=2.0)[1].item() == pytest.approx(0.01 * 10 ** (4 * 0.25), rel=1e-6)
    phases = np.arctan(cosine(9, 0.002, 120.0)[:-1].double().numpy())
    assert np.diff(phases) == pytest.approx((math.atan(0.002) - math.atan(120)) / 8, rel=1e-5)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("top", [HIGH, 1.0, 0.5])
def test_every_schedule_falls_and_takes_one_step(name: str, top: float) -> None:
    for steps in (1, 2, 7):
        if name == "sd_turbo" and steps > 1 and top < HIGH:
            continue  # it has so few timesteps
        sigmas = SCHEDULES[name](steps, LOW, top, TABLE)
        values = sigmas.tolist()
        assert sigmas.dtype == torch.float32
        assert len(values) == steps + 1
        assert values == sorted(set(values), reverse=True)
        assert values[-1] == 0
        assert values[-2] >= LOW * 0.999
        if name in ("lcm", "sd_turbo") or (name == "ddim_uniform" and steps > 1):
            assert 0.1 * top < values[0] <= top * 1.0001
        else:
            assert values[0] == pytest.approx(top, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        ("trailing", 1, [999]),
        ("trailing", 2, [999, 499]),
        ("trailing", 4, [999, 749, 499, 249]),
        ("lcm", 1, [999]),
        ("lcm", 2, [999, 499]),
        ("lcm", 4, [999, 759, 499, 259]),
        ("lcm", 8, [999, 879, 759, 639, 499, 379, 259, 139]),
        ("trailing", 8, [999, 874, 749, 624, 499, 374, 249, 124]),
        ("trailing", 12, [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82]),
        ("sd_turbo", 1, [999]),
        ("sd_turbo", 4, [999, 899, 799, 699]),
        ("sd_turbo", 10, list(range(999, 0, -100))),
        ("simple", 4, [999, 749, 499, 249]),
        ("simple", 7, [999, 857, 714, 571, 428, 285, 142]),
        ("ddim_uniform", 20, list(range(951, 0, -50))),
        ("ddim_uniform", 1, [999]),
        ("linear", 10, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
    ],
)
def test_timesteps(name: str, steps: int, expected: list[int]) -> None:
    assert timesteps(name, steps) == expected


def test_turbo_begins_at_the_published_levels() -> None:
    assert make_sigmas("trailing", 4, sigma_min=LOW, sigma_max=HIGH, table=TABLE).tolist() == pytest.approx(
        [14.615, 4.082, 1.613, 0.693, 0], abs=6e-4
    )


@pytest.mark.parametrize(("spacing", "name"), [("trailing", "trailing"), ("leading", "ddim_uniform")])
@pytest.mark.parametrize("steps", [2, 7, 20, 30])
def test_timesteps_are_those_of_diffusers(spacing: str, name: str, steps: int) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing=spacing, steps_offset=1
    )
    scheduler.set_timesteps(steps)
    assert timesteps(name, steps) == [int(time) for time in scheduler.timesteps]
    torch.testing.assert_close(SCHEDULES[name](steps, LOW, HIGH, TABLE), scheduler.sigmas, rtol=1e-4, atol=0)


def test_sgm_uniform_is_linear_of_one_step_more_without_its_end() -> None:
    ours = SCHEDULES["sgm_uniform"](12, LOW, HIGH, TABLE)
    assert ours[:-1].equal(SCHEDULES["linear"](13, LOW, HIGH, TABLE)[:-2])


def test_quantiles_of_the_beta_distribution() -> None:
    """In closed form for a = b = 1/2 and for b = 1; for 0.6 by numerical integration of the density."""
    levels = [0.001, 0.05, 0.3, 0.5, 0.77, 0.999, 1.0]
    assert beta_quantiles(levels, 0.5, 0.5) == pytest.approx([math.sin(math.pi * q / 2) ** 2 for q in levels], rel=1e-9)
    assert beta_quantiles(levels, 1.3, 1.0) == pytest.approx([q ** (1 / 1.3) for q in levels], rel=1e-9)
    angles = np.linspace(0, math.pi / 2, 200_001)  # x = sin^2: the density is 2 (sin cos)^0.2
    density = (np.sin(angles) * np.cos(angles)) ** 0.2
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    found = np.interp(np.array(levels) * cumulative[-1], cumulative, np.sin(angles) ** 2)
    assert beta_quantiles(levels, 0.6, 0.6) == pytest.approx(found.tolist(), abs=1e-6)


def test_beta_is_dense_at_both_ends() -> None:
    places = np.interp(np.log(SCHEDULES["beta"](20, LOW, HIGH, TABLE)[:-1].tolist()), np.log(TABLE), np.arange(1000))
    gaps = -np.diff(places)
    assert gaps[0] < 0.6 * gaps[10]
    assert gaps[-1] < 0.8 * gaps[10]


def test_make_sigmas_begins_at_the_start_and_spans_the_rest() -> None:
    for name in ("karras", "exponential"):
        assert make_sigmas(name, 6, sigma_min=0.002, sigma_max=120.0, start=0.8).equal(SCHEDULES[name](6, 0.002, 0.8))
        assert make_sigmas(name, 6, sigma_min=0.002, sigma_max=120.0).equal(SCHEDULES[name](6, 0.002, 120.0))
    assert make_sigmas("Normal", 3, sigma_min=LOW, sigma_max=HIGH, table=TABLE, start=TABLE[400])[1].item() == pytest.approx(
        TABLE[200], rel=1e-5
    )


def test_discarding_the_penultimate_level_keeps_the_count() -> None:
    full = make_sigmas("karras", 11, sigma_min=0.03, sigma_max=14.6).tolist()
    less = make_sigmas("karras", 10, sigma_min=0.03, sigma_max=14.6, discard_penultimate=True).tolist()
    assert less == [*full[:-2], 0]
    assert len(make_sigmas("karras", 1, sigma_min=0.03, sigma_max=14.6, discard_penultimate=True)) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "karas"}, "unknown schedule 'karas': did you mean 'karras'"),
        ({"start": 200.0}, "start 200: give a sigma above 0.002 and at most 120"),
        ({"start": 0.001}, "start 0.001: give a sigma above 0.002"),
        ({"start": math.nan}, "start nan"),
        ({"steps": 0}, "steps 0"),
        ({"schedule": "beta"}, "needs a checkpoint's timesteps, and this one has none: use karras or exponential"),
        ({"schedule": "lcm", "table": TABLE, "steps": 51, "sigma_max": HIGH}, "steps 51: an LCM knows 50 timesteps"),
        ({"schedule": "simple", "table": TABLE, "sigma_max": HIGH, "start": 0.1}, "steps 200: .* give at most 1[0-9],"),
    ],
)
def test_refusals_name_the_value(options: dict[str, object], words: str) -> None:
    asked = {"schedule": "karras", "steps": 200, "sigma_min": 0.002, "sigma_max": 120.0, **options}
    with pytest.raises(RequestError, match=words):
        make_sigmas(**asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "strength", "kept"), [(20, 0.35, 7), (20, 1.0, 20), (4, 0.5, 2), (4, 0.3, 1), (42, 0.99, 41)]
)
def test_strength_is_the_tail_of_the_schedule(steps: int, strength: float, kept: int) -> None:
    sigmas = exponential(steps, 0.03, 14.6)
    tail = strength_sigmas(sigmas, strength)
    assert tail.equal(sigmas[-kept - 1 :])


@pytest.mark.parametrize(
    ("strength", "words"),
    [
        (0.2, r"strength 0.2 leaves none of 4 steps: give a strength of at least 0.25"),
        (0.0, "strength 0 leaves none"),
        (1.5, r"strength 1.5: give a number from 0 to 1"),
    ],
)
def test_a_strength_that_leaves_no_step_names_itself(strength: float, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        strength_sigmas(exponential(4, 0.03, 14.6), strength)


def test_schedules_are_those_of_the_catalogue() -> None:
    assert list(SCHEDULES) == list(registry.SCHEDULE_FACTS)
    assert find_schedule("SGM Uniform") is SCHEDULES["sgm_uniform"]


def test_the_sd_turbo_schedule_is_that_of_comfyui_and_turbo_that_of_a1111() -> None:
    levels = make_sigmas("sd_turbo", 4, sigma_min=LOW, sigma_max=HIGH, table=TABLE).tolist()
    assert levels == pytest.approx([14.61464, 8.30280, 5.08776, 3.32108, 0], abs=1e-5)
    assert make_sigmas("sd_turbo", 2, sigma_min=LOW, sigma_max=HIGH, table=TABLE, start=TABLE[499]).tolist() == pytest.approx(
        [TABLE[499], TABLE[399], 0]
    )
    assert find_schedule("turbo") is SCHEDULES["trailing"]
    assert find_schedule("kl_optimal") is SCHEDULES["cosine"]
    with pytest.raises(RequestError, match=r"steps 11: schedule sd_turbo has 10 timesteps.*or `schedule` trailing"):
        make_sigmas("sd_turbo", 11, sigma_min=LOW, sigma_max=HIGH, table=TABLE)


def test_sgm_uniform_is_linear_in_t_without_its_last() -> None:
    times = np.interp(np.log(SCHEDULES["sgm_uniform"](4, LOW, HIGH, TABLE)[:-1]), np.log(TABLE), np.arange(1000))
    assert times == pytest.approx([999, 749.25, 499.5, 249.75], abs=1e-3)
