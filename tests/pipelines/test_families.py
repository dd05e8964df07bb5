"""Families against the upstream pipelines that run them: tiny random checkpoints, the same words and noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hires._imports import quiet_imports
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.noise_levels import vp_sigmas
from hires.devices import machines
from hires.engine import engine, requests
from hires.errors import ModelError, RequestError
from hires.images.whole import on_canvas
from hires.models.text_encoders import encode_prompts
from hires.options.render import RenderRequest
from hires.pipelines import load, progressive
from hires.pipelines.base import Runtime, Session
from hires.planning import planner
from hires.planning.plan import MemoryPlan
from hires.sampling.denoisers import timestep_of
from hires.sampling.noise import CanvasNoise
from hires.tiling.geometry import Box, Size
from hires.units import parse_bytes
from tests.support import checkpoints

CPU = torch.device("cpu")
SIZE = Size(192, 256)
CELLS = Box(0, 0, 24, 32)
PROMPT = "a red sun"

with quiet_imports():
    import diffusers


class Run:
    """A checkpoint loaded and run as the engine does, up to the latents."""

    def __init__(self, made: checkpoints.Checkpoint, picture: NDArray[np.uint8] | None = None, **options: Any) -> None:
        request = RenderRequest(
            prompt=PROMPT, size=SIZE, model=str(made.path), parts=None if made.parts is None else str(made.parts), **options
        )
        self.spec: ModelSpec = requests.spec_for(request)
        self.plan: MemoryPlan = planner.plan(request, self.spec, machines.host_device(parse_bytes("4GiB")))
        drawn = None if picture is None else on_canvas(picture, SIZE, self.plan.canvas)
        runtime = Runtime.of(request, self.plan, CPU)
        self.family: Session = load.load_session(request, self.plan, self.spec, runtime, drawn)
        self.latents = progressive.run(self.family, self.plan, 0, lambda event: None, drawn).latents
        self.words = encode_prompts(self.spec, [PROMPT, ""], torch.float32, CPU)

    @property
    def noise(self) -> Tensor:
        return CanvasNoise(0, 0, CELLS, 4)(-1)

    @property
    def embeds(self) -> dict[str, Tensor | None]:
        full, none = self.words
        found = {"prompt_embeds": full.tokens, "negative_prompt_embeds": none.tokens}
        if full.pooled is None:
            return found
        return found | {"pooled_prompt_embeds": full.pooled, "negative_pooled_prompt_embeds": none.pooled}


def same(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, float(theirs.abs().max()))


def xl(made: checkpoints.Checkpoint, scheduler: Any, kind: str = "StableDiffusionXLPipeline", **options: Any) -> Any:
    pipe = getattr(diffusers, kind)(
        vae=made.vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=made.network,
        scheduler=scheduler, force_zeros_for_empty_prompt=False, add_watermarker=False, **options,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edm(kind: str = "EDMEulerScheduler") -> Any:
    options = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
    return getattr(diffusers, kind)(sigma_schedule="exponential", **options)


SDXL_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_cosxl(tmp_path: Path, layout: str) -> None:
    made = checkpoints.make(tmp_path, "cosxl", layout)
    run = Run(made, steps=5, guidance=4.0)
    assert run.plan.stages[0].schedule == "exponential"
    theirs = xl(made, edm())(
        **run.embeds, latents=run.noise, num_inference_steps=5, guidance_scale=4.0, height=192, width=256, output_type="latent"
    ).images
    same(run.latents, theirs)


@pytest.mark.parametrize(("family", "prediction"), [("sdxl", "epsilon"), ("sdxl-v", "v_prediction")])
def test_sdxl(tmp_path: Path, family: str, prediction: str) -> None:
    made = checkpoints.make(tmp_path, family)
    run = Run(made, steps=4, guidance=5.0, sampler="euler", schedule="trailing")
    scheduler = diffusers.EulerDiscreteScheduler(
        **SDXL_BETAS,
        prediction_type=prediction,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=run.spec.zero_terminal_snr,
    )
    # upstream leaves the trailing start at sigma where it should be sqrt(sigma^2 + 1): the same noise must be handed in
    first = float(scheduler.init_noise_sigma)
    scheduler.set_timesteps(4)
    start = run.noise * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5
    theirs = xl(made, scheduler)(
        **run.embeds,
        latents=start / float(scheduler.init_noise_sigma),
        num_inference_steps=4,
        guidance_scale=5.0,
        height=192,
        width=256,
        output_type="latent",
    ).images
    assert first > 0
    same(run.latents, theirs)


def test_sd15(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "sd15")
    run = Run(made, steps=5, guidance=6.0, sampler="dpmpp_2m", schedule="karras")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SDXL_BETAS, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True, lower_order_final=False
    )
    scheduler.set_timesteps(5)
    pipe = diffusers.StableDiffusionPipeline(
        vae=made.vae, text_encoder=None, tokenizer=None, unet=made.network, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        **run.embeds, latents=run.noise, num_inference_steps=5, guidance_scale=6.0, height=192, width=256, output_type="latent"
    ).images
    assert run.latents.shape == theirs.shape
    same(run.latents, theirs)


def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)


@pytest.mark.parametrize(("family", "scaled"), [("cosxl-edit", True), ("sdxl-ip2p", False)])
def test_edit(tmp_path: Path, family: str, scaled: bool) -> None:
    made = checkpoints.make(tmp_path, family)
    sampler = {} if scaled else {"sampler": "euler", "schedule": "trailing"}
    run = Run(made, picture(), steps=4, guidance=7.0, image_guidance=1.5, **sampler)
    euler = diffusers.EulerDiscreteScheduler(**SDXL_BETAS, timestep_spacing="trailing")
    scheduler = edm() if scaled else euler
    scheduler.set_timesteps(4)
    sigma = float(scheduler.sigmas[0])
    start = run.noise * (sigma**2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)
    pipe = xl(made, scheduler, "StableDiffusionXLInstructPix2PixPipeline", is_cosxl_edit=scaled)
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 255
    theirs = pipe(
        **run.embeds, image=pixels, latents=start, num_inference_steps=4, guidance_scale=7.0, image_guidance_scale=1.5,
        height=192, width=256, output_type="latent",
    ).images  # fmt: skip
    same(run.latents, theirs)
    unscaled = progressive.run(run.family, run.plan, 1, lambda event: None).latents
    assert (unscaled - theirs).abs().max() > 1e-2, "another seed gives another picture, so the comparison can fail"


def test_turbo_in_one_step(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "sdxl-turbo", name="sd_xl_turbo.safetensors")
    run = Run(made, steps=1)
    assert run.spec.profile is not None and run.spec.profile.name == "turbo"
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SDXL_BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    start = run.noise * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)
    embeds = {k: v for k, v in run.embeds.items() if "negative" not in k}
    theirs = xl(made, scheduler)(
        **embeds, latents=start, num_inference_steps=1, guidance_scale=0.0, height=192, width=256, output_type="latent"
    ).images
    same(run.latents, theirs)


def lcm_scheduler(betas: dict[str, Any]) -> Any:
    return diffusers.LCMScheduler(**betas, clip_sample=False, set_alpha_to_one=True, original_inference_steps=50)


def canvas_noises(run: Run) -> Any:
    """Upstream's noise of step i is ours."""
    draws = iter(range(100))
    return lambda *args, **kwargs: CanvasNoise(0, 0, CELLS, 4)(next(draws))


def test_lcm_on_sdxl(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "sdxl-lcm", name="lcm.safetensors")
    run = Run(made, steps=4)
    assert run.plan.stages[0].sampler == "lcm"
    embeds = {k: v for k, v in run.embeds.items() if "negative" not in k}
    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", canvas_noises(run)):
        theirs = xl(made, lcm_scheduler(SDXL_BETAS))(
            **embeds, latents=run.noise, num_inference_steps=4, guidance_scale=1.0, height=192, width=256, output_type="latent"
        ).images
    same(run.latents, theirs)


PIXART_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}


def alpha_pipe(made: checkpoints.Checkpoint, scheduler: Any) -> Any:
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=made.vae, transformer=made.network, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def alpha_words(run: Run) -> dict[str, Any]:
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": run.words[0].tokens,
        "prompt_attention_mask": run.words[0].mask,
        "negative_prompt_embeds": run.words[1].tokens,
        "negative_prompt_attention_mask": run.words[1].mask,
        "height": 192,
        "width": 256,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


def test_pixart_delta(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "pixart-delta", name="pixart_lcm.pth")
    run = Run(made, steps=4)
    assert run.spec.family == "pixart-delta"
    pipe = alpha_pipe(made, lcm_scheduler(PIXART_BETAS))
    with mock.patch("diffusers.schedulers.scheduling_lcm.randn_tensor", canvas_noises(run)):
        theirs = pipe(**alpha_words(run), latents=run.noise, num_inference_steps=4, guidance_scale=1.0).images
    same(run.latents, theirs)


def test_pixart_dmd_is_its_closed_form(tmp_path: Path) -> None:
    """x0 = (z - sqrt(1 - abar) eps(z, 400)) / sqrt(abar) with z unscaled, abar_400 = 0.193572."""
    made = checkpoints.make(tmp_path, "pixart-dmd", name="pixart_dmd.pth")
    run = Run(made)
    sigma = vp_sigmas("linear", 0.0001, 0.02)[400]
    assert 1 / (sigma**2 + 1) == pytest.approx(0.193572, abs=1e-6)
    z, words = run.noise, run.words[0]
    eps = made.network(
        z,
        encoder_hidden_states=words.tokens,
        encoder_attention_mask=words.mask,
        timestep=torch.tensor([400]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0][:, :4]
    abar = 1 / (sigma**2 + 1)
    same(run.latents, (z - (1 - abar) ** 0.5 * eps) / abar**0.5)


def test_a_scheduler_that_clips_does_not_clip_dmd(tmp_path: Path) -> None:
    """diffusers' DDPMScheduler clips x0 to [-1, 1] unless told not to; a folder that says so changes nothing here."""
    made = checkpoints.make(tmp_path, "pixart-dmd", "folder")
    plain = Run(made, family="pixart-dmd").latents
    assert plain.abs().max() > 1
    file = made.path / "scheduler" / "scheduler_config.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"_class_name": "DDPMScheduler", "clip_sample": True}))
    assert torch.equal(Run(made, family="pixart-dmd").latents, plain)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_renders_from_its_checkpoint(tmp_path: Path, name: str) -> None:
    """By its own defaults, from the layout its files come in: nothing in the table is half supported."""
    facts = FAMILIES[name]
    made = checkpoints.make(tmp_path, name)
    edits = facts.image_channels > 0
    run = Run(made, picture() if edits else None, steps=facts.defaults.steps if facts.few_step else 2, family=name)
    assert run.spec.family == name
    assert run.latents.shape == (1, 4, 24, 32)
    assert torch.isfinite(run.latents).all()
    pixels = torch.cat(list(run.family.decode_bands(run.latents, lambda done, total: None)), dim=2)
    assert pixels.shape == (1, 3, 192, 256)


PIXARTS = [name for name, facts in FAMILIES.items() if facts.network == "pixart" and facts.same_keys_as is None]


@pytest.mark.parametrize("name", PIXARTS)
def test_pixart_by_its_own_defaults(tmp_path: Path, name: str) -> None:
    """Loader, T5, mask, schedule, guidance and solver as the plan has them, against the pipeline as its card has it."""
    made = checkpoints.make(tmp_path, name)
    run = Run(made, family=name)
    scheduler = diffusers.DPMSolverMultistepScheduler(**PIXART_BETAS, algorithm_type="dpmsolver++", solver_order=2)
    kind = diffusers.PixArtAlphaPipeline if "alpha" in name else diffusers.PixArtSigmaPipeline
    pipe = kind(tokenizer=None, text_encoder=None, vae=made.vae, transformer=made.network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(**alpha_words(run), latents=run.noise, num_inference_steps=20, guidance_scale=4.5).images
    same(run.latents, theirs)


def test_sdxl_on_karras(tmp_path: Path) -> None:
    """All 30 steps of its defaults but for the solver: upstream's 2M cuts the timesteps of karras sigmas to whole ones."""
    made = checkpoints.make(tmp_path, "sdxl")
    run = Run(made, sampler="euler", schedule="karras")
    stage = run.plan.stages[0]
    assert (run.spec.defaults.sampler, stage.schedule, stage.steps) == ("dpmpp_2m", "karras", 30)
    scheduler = diffusers.EulerDiscreteScheduler(**SDXL_BETAS, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.set_timesteps(30)
    start = run.noise * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)
    theirs = xl(made, scheduler)(
        **run.embeds, latents=start, num_inference_steps=30, guidance_scale=stage.guidance, height=192, width=256,
        output_type="latent",
    ).images  # fmt: skip
    same(run.latents, theirs)


def test_pixart_reads_prompts_as_its_captions_were(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "pixart-sigma-256")
    run = Run(made, family="pixart-sigma-256", steps=1)
    shouted = encode_prompts(run.spec, [" A RED Sun "], torch.float32, CPU)[0]
    assert torch.equal(shouted.tokens, run.words[0].tokens)


@pytest.mark.parametrize(("name", "levels"), [("sdxl-turbo", [499, 249]), ("pixart-dmd", [400]), ("sdxl-lcm", [339, 179])])
def test_few_step_models_relay_at_timesteps_they_know(tmp_path: Path, name: str, levels: list[int]) -> None:
    made = checkpoints.make(tmp_path, name)
    spec = requests.spec_for(RenderRequest(prompt="", size=SIZE, model=str(made.path), parts=str(made.parts), family=name))
    big = Size(4 * spec.native_px, 4 * spec.native_px)
    plan = planner.plan(RenderRequest(prompt="", size=big), spec, machines.described_card(parse_bytes("24GB")))
    assert len(plan.stages) > 1
    time = timestep_of(vp_sigmas(*(spec.vp_betas or ())))
    for stage in plan.stages[1:]:
        taken = [time(float(sigma)) for sigma in progressive.stage_sigmas(spec, stage)[:-1]]
        assert taken == pytest.approx(levels, abs=0.05)


def test_guidance_0_is_none_for_a_few_step_model(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "sdxl-turbo")
    none, one = (Run(made, family="sdxl-turbo", steps=1, guidance=value) for value in (0.0, 1.0))
    assert torch.equal(none.latents, one.latents)
    assert any("guidance 0 taken as 1" in note for note in none.plan.notes)
    plain = Run(checkpoints.make(tmp_path, "sdxl"), steps=1, guidance=0.0)
    assert any("leans to the negative prompt" in note for note in plain.plan.notes)


def test_more_steps_than_timesteps_are_refused_before_anything_runs(tmp_path: Path) -> None:
    made = checkpoints.make(tmp_path, "pixart-delta", name="pixart_lcm.pth")
    given = {"model": str(made.path), "parts": made.parts, "vram": "24GB"}
    with pytest.raises(RequestError, match="steps 51: an LCM knows 50 timesteps"):
        engine.plan(size="1024x1024", steps=51, **given)
    assert [stage.steps for stage in engine.plan(size="4096x4096", steps=28, **given).stages] == [28, 2, 2]
    sigma = checkpoints.make(tmp_path, "pixart-sigma-256")
    given |= {"model": str(sigma.path), "parts": sigma.parts}
    with pytest.raises(RequestError, match=r"refine 1 would take 500 steps of `schedule` linspace, which has 259 timesteps"):
        engine.plan(size="1024x1024", steps=1000, **given)


def test_a_vae_of_another_scale_is_refused(tmp_path: Path) -> None:
    sigma, alpha = checkpoints.make(tmp_path / "a", "pixart-sigma-256"), checkpoints.make(tmp_path / "b", "pixart-alpha-256")
    with pytest.raises(ModelError, match=r"latent scale 0.18215, PixArt-Σ 256 needs one of 0.13025"):
        engine.plan(size="256x256", model=str(sigma.path), parts=alpha.parts, vram="24GB")
