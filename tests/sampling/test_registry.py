"""Names people type, what a sampler costs, and combinations that are refused with the one that would do."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hires.errors import RequestError
from hires.options import render
from hires.sampling.registry import (
    SAMPLER_FACTS,
    SCHEDULE_FACTS,
    check_combination,
    evaluations,
    find_sampler_name,
    find_schedule_name,
    resolve,
)

# A1111's list as users see it, with the schedule that belongs to it there.
A1111 = {
    "Euler a": "euler_ancestral",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_ancestral",
    "DPM++ 2S a": "dpmpp_2s_ancestral",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM fast": "dpm_fast",
    "DPM adaptive": "dpm_adaptive",
    "Restart": "restart",
    "DDIM": "ddim",
    "UniPC": "unipc",
    "LCM": "lcm",
    "TCD": "tcd",
}


def test_every_sampler_has_its_name_of_a1111() -> None:
    assert sorted(A1111.values()) == sorted(SAMPLER_FACTS)
    for label, name in A1111.items():
        assert SAMPLER_FACTS[name].label == label
        assert find_sampler_name(label) == (name, None)
        assert find_sampler_name(label.lower()) == (name, None)
        assert find_sampler_name(f"{label} Karras") == (name, "karras")
        assert find_sampler_name(f"{label} Exponential") == (name, "exponential")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("dpmpp_2m", ("dpmpp_2m", None)),
        ("k_euler", ("euler", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("k_dpm_2_a", ("dpm_2_ancestral", None)),
        ("k_dpmpp_2s_a_ka", ("dpmpp_2s_ancestral", "karras")),
        ("dpmpp_2m_sde_gpu", ("dpmpp_2m_sde", None)),
        ("uni_pc", ("unipc", None)),
        ("  DPM++  2M   karras ", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Heun Exponential", ("dpmpp_2m_sde_heun", "exponential")),
        ("DPM++ 2M SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("Euler Normal", ("euler", "linear")),
    ],
)
def test_names_of_other_programs(text: str, found: tuple[str, str | None]) -> None:
    assert find_sampler_name(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Karras", "karras"),
        ("normal", "linear"),
        ("SGM Uniform", "sgm_uniform"),
        ("sgm_uniform", "sgm_uniform"),
        ("ddim_uniform", "ddim_uniform"),
        ("leading", "ddim_uniform"),
        ("turbo", "trailing"),
        ("sd_turbo", "sd_turbo"),
        ("kl_optimal", "cosine"),
        ("Beta", "beta"),
    ],
)
def test_names_of_schedules(text: str, found: str) -> None:
    assert find_schedule_name(text) == found


def test_no_name_means_two_things() -> None:
    from hires.sampling.registry import _plain

    tables: tuple[Any, ...] = (SAMPLER_FACTS, SCHEDULE_FACTS)
    for table in tables:
        meant: dict[str, str] = {}
        for facts in table.values():
            for text in (facts.name, facts.label, *facts.aliases):
                assert meant.setdefault(_plain(text), facts.name) == facts.name, text


@pytest.mark.parametrize("text", ["eular", "", "karras", "DPM++ 2M Karas", "euler karras karras"])
def test_unknown_samplers_list_the_known(text: str) -> None:
    with pytest.raises(RequestError, match=f"unknown sampler '{text}'".replace("+", r"\+") + ".*known: .*dpmpp_2m"):
        find_sampler_name(text)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(RequestError, match="did you mean 'dpmpp_2m'"):
        find_sampler_name("dpmp_2m")
    with pytest.raises(RequestError, match="unknown schedule 'exponentail': did you mean 'exponential'"):
        find_schedule_name("exponentail")


def test_a_schedule_is_given_once() -> None:
    assert resolve("DPM++ 2M Karras", "karras") == ("dpmpp_2m", "karras")
    assert resolve("Euler a", "normal") == ("euler_ancestral", "linear")
    assert resolve(None, "exp") == (None, "exponential")
    assert resolve(None, None) == (None, None)
    with pytest.raises(RequestError, match="'DPM\\+\\+ 2M Karras' says karras and `schedule` says exponential"):
        resolve("DPM++ 2M Karras", "exponential")


def test_types_have_the_names_of_the_catalogue() -> None:
    assert tuple(SAMPLER_FACTS) == render.SAMPLER_NAMES
    assert tuple(SCHEDULE_FACTS) == render.SCHEDULE_NAMES
    assert all(facts.schedule is None or facts.schedule in SCHEDULE_FACTS for facts in SAMPLER_FACTS.values())


def test_evaluations_by_the_formula() -> None:
    """Counted in test_samplers.py; here the numbers people compare."""
    assert [evaluations(name, 42) for name in ("euler", "dpmpp_2m", "dpmpp_3m_sde", "dpm_fast")] == [42] * 4
    assert [evaluations(name, 42) for name in ("heun", "dpm_2", "dpmpp_sde", "dpmpp_2s_ancestral", "restart")] == [83] * 5
    assert evaluations("dpm_adaptive", 10) == evaluations("dpm_adaptive", 100)
    assert [name for name, facts in SAMPLER_FACTS.items() if not facts.known] == ["dpm_adaptive"]


TABLED = [name for name, facts in SCHEDULE_FACTS.items() if facts.table]


@pytest.mark.parametrize("schedule", TABLED)
def test_a_schedule_of_timesteps_is_refused_on_cosxl(schedule: str) -> None:
    with pytest.raises(RequestError, match=f"schedule {schedule} is made of .* timesteps; this one is edm_v.*exponential"):
        check_combination("euler", schedule, "edm_v")
    check_combination("euler", schedule, "edm_v", force=True)


@pytest.mark.parametrize("parameterisation", ["edm_v", "eps", "v", "x0"])
def test_everything_else_is_allowed(parameterisation: str) -> None:
    for sampler, schedule in itertools.product(SAMPLER_FACTS, SCHEDULE_FACTS):
        if parameterisation == "edm_v" and (sampler == "tcd" or schedule in TABLED):
            with pytest.raises(RequestError):
                check_combination(sampler, schedule, parameterisation)
        else:
            check_combination(sampler, schedule, parameterisation)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("tcd", "karras", "edm_v"), {}, "sampler tcd counts .*take lcm or euler_ancestral"),
        (("euler", "sd_turbo", "eps"), {"steps": 11}, "steps 11: schedule sd_turbo has 10 timesteps"),
        (("lcm", "lcm", "edm_v"), {"few_step": "lcm"}, "take exponential"),
        (("lcm", "lcm", "eps"), {"few_step": "lcm", "steps": 51}, "steps 51: an LCM knows 50 timesteps"),
        (("euler", "trailing", "eps"), {"few_step": "dmd", "steps": 4}, "steps 4: a DMD .*take `steps` 1"),
        (("euler", "karras", "flow"), {}, "unknown parameterisation 'flow'"),
        (("euler", "karras", "eps"), {"few_step": "yoso"}, "unknown few-step kind 'yoso'"),
    ],
)
def test_refusals_name_what_would_do(arguments: tuple[str, str, str], options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        check_combination(*arguments, **options)
    check_combination(*arguments, **options, force=True)


def test_few_step_checkpoints_run_as_they_were_made_and_as_they_are_asked_to() -> None:
    check_combination("lcm", "sgm_uniform", "eps", few_step="lcm", steps=4)
    check_combination("euler", "sd_turbo", "eps", few_step="turbo", steps=4)
    check_combination("lcm", "exponential", "edm_v", steps=30)
    check_combination("lcm", "lcm", "eps", few_step="lcm", steps=4)
    check_combination("euler_ancestral", "trailing", "eps", few_step="turbo", steps=1)
    check_combination("euler", "trailing", "eps", few_step="dmd", steps=1)


@pytest.mark.parametrize("sampler", SAMPLER_FACTS)
def test_samplers_with_memory_are_refused_on_tile_grids_that_move(sampler: str) -> None:
    asked = (sampler, "karras", "eps")
    if SAMPLER_FACTS[sampler].multistep:
        with pytest.raises(RequestError, match=rf"sampler {sampler} reuses .*take a single-step sampler \(euler, heun"):
            check_combination(*asked, moving_tiles=True)
        check_combination(*asked, moving_tiles=True, force=True)
    else:
        check_combination(*asked, moving_tiles=True)
