"""Facts about samplers and schedules: names, costs, and valid combinations.

Imports no torch. A new sampler takes three edits: its function in `single_step.py`, `multi_step.py` or a file of its own, its
facts here, and its name in `samplers.py`. Options, help, the docs and the server's listings read the facts from here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hires.errors import RequestError, unknown

PARAMETERISATIONS = ("edm_v", "eps", "v", "x0")
LCM_TIMESTEPS = 50  # the timesteps, of 1000, that an LCM was distilled at
FEW_STEP = ("lcm", "turbo", "dmd")
VP = ("eps", "v", "x0")
ADAPTIVE_EVALUATIONS = 45  # of dpm_adaptive; measured: 21 to 42 on Gaussian mixtures (sigma 0.8 to 157), 33 on the demo model


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerFacts:
    """The facts of one sampler."""

    name: str
    """Its name here."""
    label: str
    """Its name in A1111."""
    aliases: tuple[str, ...] = ()
    """Its names in ComfyUI and in the API of A1111."""
    evaluations: int = 1
    """Evaluations of the denoiser per step."""
    last: int = 1
    """Evaluations of the last step, to sigma 0."""
    multistep: bool = False
    """Whether it reuses the estimates of earlier steps."""
    stochastic: bool = False
    """Whether it adds noise on the way."""
    discard_penultimate: bool = False
    """Whether it runs on a schedule of one more step without its last level before 0."""
    schedule: str | None = None
    """The schedule that its authors or A1111 use with it."""
    canvas_latents: int = 0
    """Canvas latents that it holds beside x and the estimate."""
    known: bool = True
    """Whether the number of evaluations is known in advance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleFacts:
    """The facts of one schedule."""

    name: str
    """Its name here."""
    label: str
    """Its name in A1111."""
    aliases: tuple[str, ...] = ()
    """Its names in ComfyUI and in the API of A1111."""
    fits: tuple[str, ...] = PARAMETERISATIONS
    """The parameterisations that can use it."""
    table: bool = False
    """Whether it consists of a checkpoint's discrete timesteps."""


SAMPLER_FACTS: Mapping[str, SamplerFacts] = {
    facts.name: facts
    for facts in (
        SamplerFacts(name="euler", label="Euler", aliases=("k_euler",)),
        SamplerFacts(name="euler_ancestral", label="Euler a", aliases=("k_euler_a", "k_euler_ancestral"), stochastic=True),
        SamplerFacts(name="heun", label="Heun", aliases=("k_heun",), evaluations=2, canvas_latents=2),
        SamplerFacts(
            name="dpm_2",
            label="DPM2",
            aliases=("k_dpm_2",),
            evaluations=2,
            discard_penultimate=True,
            schedule="karras",
            canvas_latents=1,
        ),
        SamplerFacts(
            name="dpm_2_ancestral",
            label="DPM2 a",
            aliases=("k_dpm_2_a", "k_dpm_2_ancestral"),
            evaluations=2,
            stochastic=True,
            discard_penultimate=True,
            schedule="karras",
            canvas_latents=1,
        ),
        SamplerFacts(name="lms", label="LMS", aliases=("k_lms",), multistep=True, canvas_latents=4),
        SamplerFacts(
            name="dpmpp_2s_ancestral",
            label="DPM++ 2S a",
            aliases=("k_dpmpp_2s_a",),
            evaluations=2,
            stochastic=True,
            schedule="karras",
            canvas_latents=1,
        ),
        SamplerFacts(
            name="dpmpp_2m", label="DPM++ 2M", aliases=("k_dpmpp_2m",), multistep=True, schedule="karras", canvas_latents=1
        ),
        SamplerFacts(
            name="dpmpp_sde",
            label="DPM++ SDE",
            aliases=("k_dpmpp_sde", "dpmpp_sde_gpu"),
            evaluations=2,
            stochastic=True,
            schedule="karras",
            canvas_latents=3,
        ),
        SamplerFacts(
            name="dpmpp_2m_sde",
            label="DPM++ 2M SDE",
            aliases=("k_dpmpp_2m_sde", "dpmpp_2m_sde_gpu"),
            multistep=True,
            stochastic=True,
            schedule="exponential",
            canvas_latents=1,
        ),
        SamplerFacts(
            name="dpmpp_2m_sde_heun",
            label="DPM++ 2M SDE Heun",
            aliases=("k_dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
            multistep=True,
            stochastic=True,
            schedule="exponential",
            canvas_latents=1,
        ),
        SamplerFacts(
            name="dpmpp_3m_sde",
            label="DPM++ 3M SDE",
            aliases=("k_dpmpp_3m_sde", "dpmpp_3m_sde_gpu"),
            multistep=True,
            stochastic=True,
            discard_penultimate=True,
            schedule="exponential",
            canvas_latents=4,
        ),
        SamplerFacts(name="dpm_fast", label="DPM fast", aliases=("k_dpm_fast",), canvas_latents=3),
        SamplerFacts(name="dpm_adaptive", label="DPM adaptive", aliases=("k_dpm_ad",), canvas_latents=6, known=False),
        SamplerFacts(
            name="restart",
            label="Restart",
            aliases=("restart_sampler",),
            evaluations=2,
            stochastic=True,
            schedule="karras",
            canvas_latents=2,
        ),
        SamplerFacts(name="unipc", label="UniPC", aliases=("uni_pc", "uni_pc_bh2"), multistep=True, canvas_latents=3),
        SamplerFacts(name="ddim", label="DDIM"),
        SamplerFacts(name="lcm", label="LCM", stochastic=True, schedule="lcm"),
    )
}
SCHEDULE_FACTS: Mapping[str, ScheduleFacts] = {
    facts.name: facts
    for facts in (
        ScheduleFacts(name="karras", label="Karras", aliases=("ka",)),
        ScheduleFacts(name="exponential", label="Exponential", aliases=("exp",)),
        ScheduleFacts(name="polyexponential", label="Polyexponential"),
        ScheduleFacts(name="cosine", label="Cosine"),
        ScheduleFacts(name="linear", label="Normal", aliases=("normal", "uniform"), fits=VP, table=True),
        ScheduleFacts(name="linspace", label="Linspace", fits=VP, table=True),
        ScheduleFacts(name="simple", label="Simple", fits=VP, table=True),
        ScheduleFacts(name="sgm_uniform", label="SGM Uniform", fits=VP, table=True),
        ScheduleFacts(name="trailing", label="Trailing", aliases=("turbo", "sd_turbo"), fits=VP, table=True),
        ScheduleFacts(name="ddim_uniform", label="DDIM", aliases=("leading", "ddim"), fits=VP, table=True),
        ScheduleFacts(name="beta", label="Beta", fits=VP, table=True),
        ScheduleFacts(name="lcm", label="LCM", fits=VP, table=True),
    )
}


def _plain(text: str) -> str:
    """The letters and digits of a name in lower case, '++' as 'pp': 'DPM++ 2M' and 'dpmpp_2m' give the same."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("++", "pp"))


def _index(table: Mapping[str, SamplerFacts] | Mapping[str, ScheduleFacts]) -> dict[str, str]:
    return {_plain(text): facts.name for facts in table.values() for text in (facts.name, facts.label, *facts.aliases)}


_SAMPLER_INDEX = _index(SAMPLER_FACTS)
_SCHEDULE_INDEX = _index(SCHEDULE_FACTS)


def find_sampler_name(text: str) -> tuple[str, str | None]:
    """The sampler of a name from hires, A1111 or ComfyUI, and the schedule that the name may end with.

    'DPM++ 2M Karras' is ('dpmpp_2m', 'karras'), 'Euler a' is ('euler_ancestral', None). RequestError, with the known names,
    for an unknown one.
    """
    if _plain(text) in _SAMPLER_INDEX:
        return _SAMPLER_INDEX[_plain(text)], None
    words = re.split(r"[\s_]+", text.strip())
    for cut in range(len(words) - 1, 0, -1):
        sampler = _SAMPLER_INDEX.get(_plain("".join(words[:cut])))
        schedule = _SCHEDULE_INDEX.get(_plain("".join(words[cut:])))
        if sampler and schedule:
            return sampler, schedule
    raise RequestError(unknown("sampler", text, SAMPLER_FACTS))


def find_schedule_name(text: str) -> str:
    """The schedule of a name from hires, A1111 or ComfyUI. RequestError, with the known names, for an unknown one."""
    if _plain(text) not in _SCHEDULE_INDEX:
        raise RequestError(unknown("schedule", text, SCHEDULE_FACTS))
    return _SCHEDULE_INDEX[_plain(text)]


def resolve(sampler: str | None, schedule: str | None) -> tuple[str | None, str | None]:
    """The canonical names of a requested sampler and schedule.

    A schedule may stand at the end of the sampler's name. RequestError if it differs from the other one.
    """
    name, suffix = (None, None) if sampler is None else find_sampler_name(sampler)
    schedule_name = suffix if schedule is None else find_schedule_name(schedule)
    if suffix is not None and schedule_name != suffix:
        raise RequestError(f"sampler {sampler!r} says {suffix} and `schedule` says {schedule_name}: give the schedule once")
    return name, schedule_name


def evaluations(sampler: str, steps: int) -> int:
    """How often a run of `steps` steps evaluates the denoiser.

    Exact for every sampler whose `known` is true; an estimate for dpm_adaptive, whose tolerances decide. A single step is one
    evaluation.
    """
    facts = SAMPLER_FACTS[sampler]
    if steps == 1:
        return 1
    return facts.evaluations * (steps - 1) + facts.last if facts.known else ADAPTIVE_EVALUATIONS


def most_steps(schedule: str, table: Sequence[float], sigma: float) -> int | None:
    """The most steps that a schedule of whole timesteps has from `sigma` down; None if there is no limit."""
    below = sum(level <= sigma * (1 + 1e-9) for level in table)
    if schedule == "lcm":
        return below * LCM_TIMESTEPS // len(table)
    return below if schedule in ("simple", "trailing", "linspace", "ddim_uniform") else None


def check_combination(
    sampler: str,
    schedule: str,
    parameterisation: str,
    *,
    moving_tiles: bool = False,
    few_step: str | None = None,
    steps: int | None = None,
    force: bool = False,
) -> None:
    """RequestError, with a name that works, for a combination known to make wrong pictures.

    Args:
        sampler: a name of `SAMPLER_FACTS`.
        schedule: a name of `SCHEDULE_FACTS`.
        parameterisation: the checkpoint's, one of `PARAMETERISATIONS`.
        moving_tiles: whether the tile grid moves at every step.
        few_step: how the checkpoint was distilled: lcm, turbo, dmd, or None.
        steps: the steps of the run, if set.
        force: skip all checks.
    """
    if force:
        return
    _check_parameterisation(schedule, parameterisation)
    _check_few_step(sampler, schedule, few_step, steps)
    if moving_tiles and SAMPLER_FACTS[sampler].multistep:
        single = ", ".join(name for name in ("euler", "heun", "dpm_2", "dpmpp_2s_ancestral") if name != sampler)
        raise RequestError(
            f"sampler {sampler} reuses estimates of earlier steps, which amplifies the jitter of a tile grid that moves "
            f"every step: take a single-step sampler ({single}), or keep the grid still"
        )


def _check_parameterisation(schedule: str, parameterisation: str) -> None:
    facts = SCHEDULE_FACTS[schedule]
    if parameterisation not in PARAMETERISATIONS:
        raise RequestError(unknown("parameterisation", parameterisation, PARAMETERISATIONS))
    if parameterisation not in facts.fits:
        others = ", ".join(other.name for other in SCHEDULE_FACTS.values() if not other.table and other.name != "exponential")
        raise RequestError(
            f"schedule {schedule} is made of a {' or '.join(facts.fits)} checkpoint's 1000 timesteps; this one is "
            f"{parameterisation}, trained on a range of sigma without timesteps: take exponential ({others} work too)"
        )


def _check_few_step(sampler: str, schedule: str, few_step: str | None, steps: int | None) -> None:
    if few_step is not None and few_step not in FEW_STEP:
        raise RequestError(unknown("few-step kind", few_step, FEW_STEP))
    if sampler == "lcm" and few_step != "lcm":
        raise RequestError("sampler lcm is for checkpoints distilled by LCM, and this one is not: take euler_ancestral")
    if schedule == "lcm" and few_step != "lcm":
        raise RequestError("schedule lcm is for checkpoints distilled by LCM, and this one is not: take karras or exponential")
    if few_step == "lcm" and (sampler, schedule) != ("lcm", "lcm"):
        raise RequestError(
            f"sampler {sampler} on {schedule}: this checkpoint is distilled by LCM for its own timesteps and for noise "
            f"after every step: take `sampler` lcm `schedule` lcm"
        )
    if schedule == "lcm" and steps is not None and steps > LCM_TIMESTEPS:
        raise RequestError(f"steps {steps}: an LCM knows {LCM_TIMESTEPS} timesteps: give fewer, such as 2 to 8")
    if few_step == "turbo" and schedule != "trailing":
        raise RequestError(f"schedule {schedule}: a Turbo checkpoint knows the timesteps of trailing: take trailing")
    if few_step == "dmd" and steps is not None and steps != 1:
        raise RequestError(f"steps {steps}: a DMD checkpoint makes its picture in one step: take `steps` 1")
