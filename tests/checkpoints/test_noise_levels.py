"""What the user says of a checkpoint's training, where its keys do not tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hires.checkpoints.spec import load_spec
from hires.engine.engine import plan
from hires.errors import RequestError
from tests.support.checkpoints import Checkpoint

Get = Callable[..., Checkpoint]


@pytest.mark.parametrize(
    ("family", "said", "then", "parameterisation", "sigma_max"),
    [
        ("sdxl", "v", "sdxl-v", "v", 14.6146),
        ("sdxl", "x0", "sdxl", "x0", 14.6146),
        ("sdxl", "edm-v", "cosxl", "edm_v", 120.0),
        ("sdxl", "eps", "sdxl", "eps", 14.6146),
        ("sdxl-v", "eps", "sdxl", "eps", 14.6146),
        ("cosxl", "v", "sdxl-v", "v", 14.6146),
        ("sd15", "v", "sd15", "v", 14.6146),
        ("pixart-sigma-256", "x0", "pixart-sigma-256", "x0", 157.407),
    ],
)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_the_prediction_is_what_the_user_says(
    family: str, said: str, then: str, parameterisation: str, sigma_max: float, layout: str, checkpoint: Get
) -> None:
    made = checkpoint(family, layout)
    spec = load_spec(str(made.path), parts=made.parts, prediction=said)
    assert (spec.family, spec.parameterisation) == (then, parameterisation)
    assert spec.sigma_max == pytest.approx(sigma_max, rel=1e-4)
    assert not spec.zero_terminal_snr
    notes = plan(size="128x128", model=str(made.path), parts=made.parts, prediction=said, vram="8GB").notes
    note = next(note for note in notes if note.startswith(f"prediction {said}: as asked for"))
    assert ("the checkpoint says" in note) == (said != "eps" or family != "sdxl")


def test_a_merge_that_lost_its_keys_runs_as_the_whole_model_does(checkpoint: Get) -> None:
    lost, whole = checkpoint("sdxl"), checkpoint("sdxl-v")
    said = load_spec(str(lost.path), parts=lost.parts, prediction="v", zero_terminal_snr=True)
    told = load_spec(str(whole.path), parts=whole.parts)
    for name in ("family", "parameterisation", "sigma_min", "sigma_max", "vp_betas", "zero_terminal_snr", "defaults"):
        assert getattr(said, name) == getattr(told, name)
    assert any(note.startswith("zero terminal SNR: as asked for") for note in said.notes)


@pytest.mark.parametrize(
    ("family", "said", "zero", "words"),
    [
        ("sdxl", None, True, "epsilon tells nothing of pure noise.*`prediction` v or x0"),
        ("cosxl", None, True, "EDM has no timesteps"),
        ("sd15", "edm-v", False, "edm-v is of SDXL checkpoints"),
        ("pixart-sigma-256", "edm-v", False, "edm-v is of SDXL checkpoints"),
        ("cosxl-edit", "eps", False, "edm-v is of SDXL checkpoints"),
    ],
)
def test_what_contradicts_the_model_is_refused(family: str, said: str | None, zero: bool, words: str, checkpoint: Get) -> None:
    with pytest.raises(RequestError, match=words):
        load_spec(str(checkpoint(family).path), prediction=said, zero_terminal_snr=zero)


def test_a_rescale_of_guidance_is_of_every_stage_that_sets_none() -> None:
    made = plan(size="512x512", guidance_rescale=0.7, relay="rescale=0.2", vram="8GB")
    assert made.stages[0].guidance_rescale == 0.7
    assert [stage.guidance_rescale for stage in made.stages[1:]] == [0.2] * (len(made.stages) - 1)
    assert "guidance rescaled by 0.7: as asked for" in made.notes
    assert plan(size="512x512", vram="8GB").stages[0].guidance_rescale == 0.0


def test_a_rescale_is_refused_where_two_guidances_act(checkpoint: Get) -> None:
    made = checkpoint("cosxl-edit", "folder")
    with pytest.raises(RequestError, match=r"guidance_rescale 0\.5: is of text guidance"):
        plan(size="256x256", model=str(made.path), image_guidance=1.5, guidance_rescale=0.5, vram="8GB")
