"""Noise levels of variance-preserving schedules, from their betas, and what the user says of them."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from hires.checkpoints.detect_file import Finding
from hires.checkpoints.families import FAMILIES
from hires.errors import ModelError, RequestError

COSXL_SIGMAS = (0.002, 120.0)
RELATED = {
    ("sdxl", "v"): "sdxl-v",
    ("sdxl", "edm_v"): "cosxl",
    ("sdxl-v", "eps"): "sdxl",
    ("sdxl-v", "edm_v"): "cosxl",
    ("cosxl", "eps"): "sdxl",
    ("cosxl", "v"): "sdxl-v",
    ("cosxl", "x0"): "sdxl",
}
"""The family whose defaults a checkpoint takes when the user says what it predicts."""
LEAST_ALPHA_BAR = 4.8973451890853435e-08  # what a rescaled schedule ends at instead of 0: sigma 4518.7


def vp_range(betas: tuple[str, float, float] | None, zero_snr: bool) -> tuple[float, float]:
    """Least and largest sigma of a variance-preserving schedule."""
    assert betas is not None, "a family has betas or a sigma range"
    sigmas = vp_sigmas(*betas, zero_snr=zero_snr)
    return sigmas[0], sigmas[-1]


@functools.lru_cache(maxsize=16)
def vp_sigmas(
    beta_schedule: str, beta_start: float, beta_end: float, count: int = 1000, *, zero_snr: bool = False
) -> tuple[float, ...]:
    """sigma_t = sqrt((1 - abar_t) / abar_t) of a variance-preserving schedule, rising with t (SDXL: 0.0292 to 14.61).

    zero_snr: sqrt(abar) is shifted and scaled so that it ends at 0 and starts where it did (Lin et al., arXiv 2305.08891);
    the last is held at LEAST_ALPHA_BAR, so that its sigma is a number.
    """
    if beta_schedule not in ("linear", "scaled_linear"):
        raise ModelError(f"beta schedule {beta_schedule!r} is not supported; supported: linear, scaled_linear")
    power = 2 if beta_schedule == "scaled_linear" else 1
    low, high = beta_start ** (1 / power), beta_end ** (1 / power)
    alphas, alpha_bar = [], 1.0
    for t in range(count):
        alpha_bar *= 1 - (low + (high - low) * t / (count - 1)) ** power
        alphas.append(alpha_bar)
    if zero_snr:
        first, last = math.sqrt(alphas[0]), math.sqrt(alphas[-1])
        roots = [(math.sqrt(alpha) - last) * first / (first - last) for alpha in alphas]
        alphas = [max(root**2, LEAST_ALPHA_BAR) for root in roots]
    return tuple(math.sqrt((1 - alpha) / alpha) for alpha in alphas)


def as_said(finding: Finding, prediction: str | None, zero_terminal_snr: bool) -> Finding:
    """The finding with what the user says of its training; unchanged where nothing is said.

    prediction: eps, v, x0 (the picture itself) or edm-v (CosXL's, over its range of sigma). RequestError for what contradicts
    itself or the model.
    """
    if finding.kind != "model" or (prediction is None and not zero_terminal_snr):
        return finding
    own = finding.parameterisation or FAMILIES[finding.family].parameterisation
    said = own if prediction is None else prediction.replace("-", "_")
    _check_said(finding, own, said, zero_terminal_snr)
    family = RELATED.get((finding.family, said), finding.family) if said != own else finding.family
    notes = [*finding.notes]
    if prediction is not None:
        notes.append(f"prediction {prediction}: as asked for" + ("" if said == own else f", the checkpoint says {own}"))
    if zero_terminal_snr:
        notes.append("zero terminal SNR: as asked for; the last timestep is pure noise")
    sigmas = (finding.sigma_range or FAMILIES[family].sigma_range or COSXL_SIGMAS) if said == "edm_v" else None
    return replace(
        finding,
        family=family,
        parameterisation=said,
        sigma_range=sigmas,
        zero_terminal_snr=zero_terminal_snr or (finding.zero_terminal_snr and said in ("v", "x0")),
        notes=tuple(notes),
    )


def _check_said(finding: Finding, own: str, said: str, zero_terminal_snr: bool) -> None:
    facts = FAMILIES[finding.family]
    if zero_terminal_snr and said in ("eps", "edm_v"):
        why = "epsilon tells nothing of pure noise" if said == "eps" else "EDM has no timesteps"
        raise RequestError(
            f"zero_terminal_snr: does not go with prediction {said.replace('_', '-')} ({why}); give `prediction` v or x0 too"
        )
    if "edm_v" in (own, said) and own != said and (facts.configs != "sdxl" or facts.image_channels or facts.few_step):
        raise RequestError(
            f"prediction {said.replace('_', '-')}: {finding.path.name} is {facts.title} ({own}); edm-v is of SDXL checkpoints "
            f"that draw from text, leave the option out"
        )
