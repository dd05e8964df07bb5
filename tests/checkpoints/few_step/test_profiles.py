"""How few-step files are run: every name people have, on the same keys, alone and as a LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hires
from hires.checkpoints.adapters.loras import with_loras
from hires.checkpoints.configs import ldm_unet_names
from hires.checkpoints.few_step.profiles import PROFILES, Profile, apart, match
from hires.checkpoints.model import ModelSpec, sigma_table
from hires.checkpoints.spec import load_spec
from hires.devices.machines import described_card
from hires.engine.requests import spec_for
from hires.errors import ModelError, RequestError
from hires.options.lora import LoraRef
from hires.options.render import RenderRequest
from hires.options.stage import StageSpec
from hires.pipelines.base import preconditioned
from hires.pipelines.progressive import noisy, stage_sigmas
from hires.planning.plan import MemoryPlan
from hires.planning.planner import plan
from hires.sampling.conditioning import guidance_embedding
from hires.sampling.denoisers import timestep_of
from hires.tiling.geometry import Size
from tests.support.checkpoints import Checkpoint, make, seeded

Get = Callable[..., Checkpoint]
EULER, SDE, LCM, TCD = ("euler", "trailing"), ("dpmpp_sde", "karras"), ("lcm", "lcm"), ("tcd", "lcm")
MODELS = [
    # findings C4
    ("juggernautXL_lightning", "lightning-merge", 6, SDE, 2, 1024),
    ("sdxl_lightning_4step", "lightning-4", 4, EULER, 1, 1024),
    ("Hyper-SDXL-1step-Unet", "hyper-1", 1, ("lcm", "trailing"), 1, 1024),
    ("dmd2_sdxl_4step", "dmd2", 4, ("lcm", "trailing"), 1, 1024),
    ("flashSDXL", "flash", 4, LCM, 1, 1024),
    ("dreamshaperXL_v21TurboDPMSDE", "turbo-merge", 5, SDE, 2, 1024),
    ("sdxl_turboVisionXL", "turbo-merge", 5, SDE, 2, 1024),
    # the published names
    ("sd_xl_turbo_1.0_fp16", "turbo", 4, ("euler_ancestral", "trailing"), 1, 512),
    ("sdxl-turbo", "turbo", 4, ("euler_ancestral", "trailing"), 1, 512),
    ("SDXLTurboMix", "turbo-merge", 5, SDE, 2, 1024),
    ("sdxl_lightning_1step_unet_x0", "lightning-1", 1, EULER, 1, 1024),
    ("sdxl_lightning_2step_unet", "lightning-2", 2, EULER, 1, 1024),
    ("sdxl_lightning_8step", "lightning-8", 8, EULER, 1, 1024),
    ("dreamshaperXL_lightningDPMSDE", "lightning-merge", 6, SDE, 2, 1024),
    ("RealVisXL_V4.0_Lightning", "lightning-merge", 6, SDE, 2, 1024),
    ("anyXL_Lightning_5steps", "lightning-merge", 5, SDE, 2, 1024),
    ("Hyper-SDXL-1step-Unet-Comfyui.fp16", "hyper-1", 1, ("lcm", "trailing"), 1, 1024),
    ("juggernautXL_v9Hyper", "hyper-merge", 6, SDE, 2, 1024),
    ("dmd2_sdxl_1step_unet_fp16", "dmd2-1", 1, ("lcm", "trailing"), 1, 1024),
    ("lcm-sdxl", "lcm", 4, LCM, 1, 1024),
    ("dreamLCM", "lcm", 4, LCM, 1, 1024),
    ("Segmind-VegaRT", "lcm", 4, LCM, 1, 1024),
    ("SDXL-Flash", "sdxl-flash", 7, ("dpmpp_sde", "trailing"), 3, 1024),
    ("sdxl-flash-mini", "sdxl-flash", 7, ("dpmpp_sde", "trailing"), 3, 1024),
]
LORAS = [
    ("sdxl_lightning_4step_lora", "lightning-4", 4, EULER, 1),
    ("sdxl_lightning_2step_lora", "lightning-2", 2, EULER, 1),
    ("SDXL-Lightning-lora", "lightning-4", 4, EULER, 1),
    ("Hyper-SDXL-1step-lora", "hyper-1-lora", 1, TCD, 1),
    ("Hyper-SDXL-2steps-lora", "hyper-2", 2, EULER, 1),
    ("Hyper-SDXL-4steps-lora", "hyper-4", 4, EULER, 1),
    ("Hyper-SDXL-8steps-lora", "hyper-8", 8, EULER, 1),
    ("Hyper-SDXL-8steps-CFG-lora", "hyper-cfg-8", 8, EULER, 5),
    ("Hyper-SDXL-12steps-CFG-lora", "hyper-cfg-12", 12, EULER, 5),
    ("dmd2_sdxl_4step_lora_fp16", "dmd2", 4, ("lcm", "trailing"), 1),
    ("lcm-lora-sdxl", "lcm", 4, LCM, 1),
    ("TCD-SDXL-LoRA", "tcd", 4, TCD, 1),
    ("pcm_sdxl_smallcfg_2step_converted", "pcm-smallcfg-2", 2, EULER, 1),
    ("pcm_sdxl_normalcfg_8step_converted_fp16", "pcm-normalcfg-8", 8, EULER, 4.5),
    ("pcm_sdxl_lcmlike_lora_converted", "pcm-lcmlike", 4, LCM, 1),
    ("flash-sdxl", "flash", 4, LCM, 1),
]
STYLES = ["calcmatic", "HyperRealisticXL", "lightningbolt_style", "flash_photography", "hyperdimension", "turbocharged_cars"]


def named(folder: Path, made: Checkpoint, name: str) -> Path:
    """The same file under another name."""
    path = folder / f"{name}{made.path.suffix}"
    os.link(made.path, path)
    return path


def planned(spec: ModelSpec, size: int = 1024, **options: object) -> MemoryPlan:
    return plan(RenderRequest(prompt="", size=Size(size, size), **options), spec, described_card(24 * 10**9))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "profile", "steps", "sampling", "guidance", "px"), MODELS)
def test_a_models_name_tells_its_run(
    name: str, profile: str, steps: int, sampling: tuple[str, str], guidance: float, px: int, tmp_path: Path, checkpoint: Get
) -> None:
    spec = load_spec(str(named(tmp_path, checkpoint("sdxl"), name)))
    assert spec.profile is not None
    assert (spec.family, spec.profile.name, spec.native_px) == ("sdxl", profile, px)
    result = planned(spec)
    base = result.stages[0]
    assert (base.steps, (base.sampler, base.schedule), base.guidance) == (steps, sampling, guidance)
    note = next(note for note in result.notes if note.startswith(f"profile {profile}"))
    assert "in its name" in note
    assert f"{steps} step" in note
    assert "`few_step` none runs it as plain SDXL" in note


def test_the_note_tells_the_words_and_the_next_move(tmp_path: Path, checkpoint: Get) -> None:
    spec = load_spec(str(named(tmp_path, checkpoint("sdxl"), "sdxl_lightning_4step")))
    assert spec.notes[-1] == (
        "profile lightning-4, 'lightning' and '4step' in its name: 4 steps of euler on trailing, guidance 1, 1024 px; "
        "`few_step` none runs it as plain SDXL"
    )


@pytest.mark.parametrize(("name", "profile", "steps", "sampling", "guidance"), LORAS)
def test_a_loras_name_tells_the_run(
    name: str, profile: str, steps: int, sampling: tuple[str, str], guidance: float, tmp_path: Path, checkpoint: Get
) -> None:
    spec = load_spec(str(checkpoint("sdxl").path))
    changed = with_loras(spec, [LoraRef(str(named(tmp_path, tiny_lora(tmp_path, checkpoint("sdxl")), name)))])
    assert changed.profile is PROFILES[profile]
    run = changed.defaults
    assert (run.steps, (run.sampler, run.schedule), run.guidance) == (steps, sampling, guidance)
    assert any(f"profile {profile}, of LoRA {name}.safetensors" in note for note in changed.notes)


def tiny_lora(folder: Path, made: Checkpoint) -> Checkpoint:
    """One layer is enough to be told."""
    path = folder / "plain.safetensors"
    name = "lora_unet_down_blocks_1_resnets_0_conv1"
    save_file({f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}, path)
    return Checkpoint(path=path, parts=None, family=made.family, network=made.network, vae=made.vae, texts=made.texts, kv={})


@pytest.mark.parametrize("name", STYLES)
def test_other_words_tell_nothing(name: str) -> None:
    for kind in ("model", "lora"):
        assert match([(name, "its name")], kind) is None


@pytest.mark.parametrize("name", ["lightning_storm", "juggernaut_turbo", "hyper_cute", "dpo_turbo_000500steps"])
def test_a_style_lora_needs_more_than_a_word(name: str) -> None:
    assert match([(name, "its name")], "lora") is None


def test_words_are_told_apart() -> None:
    assert apart("dreamshaperXL_v21TurboDPMSDE") == "dreamshaper xl_v21 turbo dpmsde"
    assert apart("SDXLTurbo") == "sdxl turbo"


@pytest.mark.parametrize(
    ("name", "kind", "profile", "reason"),
    [
        ("foo_lightning_4step_hyper8", "model", "hyper-4", "'hyper' and '4step' in its name, which also says 'lightning'"),
        ("lightning_4steps_8steps", "model", "lightning-4", "'lightning' and '4steps' in its name, which also says '8steps'"),
        ("dmd2_sdxl_8step_lora", "lora", "dmd2", "'dmd2' in its name, which also says '8step'"),
        ("sdxl_lightning_10step_lora", "lora", "lightning-4", "'lightning' and 'sd' in its name, which also says '10step'"),
        ("turbo_20steps", "model", "turbo-merge", "'turbo' in its name, which also says '20steps'"),
        ("Hyper-SDXL-8steps-CFG-lora", "lora", "hyper-cfg-8", "'hyper' and 'cfg' and '8steps' in its name"),
        ("sdxl_lightning_4step_lora-1024px", "lora", "lightning-4", "'lightning' and '4step' in its name"),
    ],
)
def test_what_a_name_says_besides_is_told(name: str, kind: str, profile: str, reason: str) -> None:
    found = match([(name, "its name")], kind)
    assert found is not None
    assert (found.profile.name, found.reason) == (profile, reason)


def test_metadata_and_the_repository_tell_too(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    titled = tmp_path / "abc.safetensors"
    save_file(load_file(made.path), titled, metadata={"modelspec.title": "My Lightning mix", "ss_sd_model_name": "hyper"})
    spec = load_spec(str(titled))
    assert spec.profile is PROFILES["lightning-merge"]
    assert "'lightning' in its metadata (modelspec.title)" in spec.notes[-1]
    cached = tmp_path / "models--tianweiy--DMD2" / "snapshots" / "a1"
    cached.mkdir(parents=True)
    assert load_spec(str(named(cached, made, "weights"))).profile is PROFILES["dmd2"]
    below = tmp_path / "sdxl_lightning_8step"
    below.mkdir()
    assert load_spec(str(named(below, made, "diffusion_pytorch_model"))).profile is PROFILES["lightning-8"]
    assert load_spec(str(named(below, made, "other"))).profile is None


def test_the_user_has_the_last_word(tmp_path: Path, checkpoint: Get) -> None:
    path = str(named(tmp_path, checkpoint("sdxl"), "sdxl_lightning_4step"))
    plain = load_spec(str(checkpoint("sdxl").path))
    assert load_spec(path, profile="none").defaults == plain.defaults
    assert load_spec(path, profile="dmd2").profile is PROFILES["dmd2"]
    asked = planned(load_spec(path), steps=6, guidance=5.0, sampler="heun", schedule="karras")
    base = asked.stages[0]
    assert (base.steps, base.guidance, base.sampler, base.schedule) == (6, 5.0, "heun", "karras")
    notes = "\n".join(asked.notes)
    for words in ("6 steps, as asked for: SDXL-Lightning, 4 steps is made for 4", "guidance 5, as asked for", "heun on karras"):
        assert words in notes
    assert not any("as asked for" in note for note in planned(load_spec(path)).notes)
    one = str(named(tmp_path, checkpoint("sdxl"), "sdxl_lightning_1step_x0"))
    assert (load_spec(one).parameterisation, load_spec(one, prediction="eps").parameterisation) == ("x0", "eps")
    family = load_spec(path, family="sdxl")
    assert family.defaults == plain.defaults
    assert "`few_step` lightning-4 runs it in few steps" in family.notes[-1]
    with pytest.raises(RequestError, match="few_step: unknown profile 'lightening-4': did you mean 'lightning-4'"):
        load_spec(path, profile="lightening-4")


def test_a_profile_of_another_kind_of_model_is_refused_or_named(tmp_path: Path, checkpoint: Get) -> None:
    cosxl = checkpoint("cosxl")
    with pytest.raises(RequestError, match=r"few_step dmd2: .* exists for sdxl with epsilon .*is cosxl \(edm_v\)"):
        load_spec(str(cosxl.path), profile="dmd2")
    spec = load_spec(str(named(tmp_path, cosxl, "cosxl_lightning")))
    assert (spec.profile, spec.defaults.steps) == (None, 30)
    assert "exists for sdxl (eps), this is cosxl (edm_v): run as plain CosXL" in spec.notes[-1]
    adapter = named(tmp_path, tiny_lora(tmp_path, cosxl), "Hyper-SDXL-8steps-lora")
    with pytest.raises(ModelError, match=r"Hyper-SD, 8 steps .*distils; .*is cosxl \(edm_v\).*or give `few_step` none"):
        with_loras(load_spec(str(cosxl.path)), [LoraRef(str(adapter))])
    assert with_loras(load_spec(str(cosxl.path)), [LoraRef(str(adapter))], "none").profile is None


def test_sd15_and_pixart_have_their_own(tmp_path: Path, checkpoint: Get) -> None:
    spec = load_spec(str(named(tmp_path, checkpoint("sd15"), "dreamshaper_8LCM")))
    assert (spec.profile, spec.native_px, spec.defaults.tile_px) == (PROFILES["lcm"], 512, 512)
    hyper = load_spec(str(checkpoint("sd15").path), profile="hyper-8")
    assert (hyper.native_px, hyper.facts.bins) == (512, 512)
    pixart = load_spec(str(checkpoint("pixart-alpha-1024").path), profile="flash")
    assert (pixart.facts.size_conditions, pixart.defaults.sampler) == ("pixart", "lcm")


def test_two_loras_of_two_kinds_are_named(tmp_path: Path, checkpoint: Get) -> None:
    made = tiny_lora(tmp_path, checkpoint("sdxl"))
    files = [LoraRef(str(named(tmp_path, made, name))) for name in ("lcm-lora-sdxl", "dmd2_sdxl_4step_lora")]
    spec = with_loras(load_spec(str(checkpoint("sdxl").path)), files)
    assert spec.profile is PROFILES["dmd2"]
    assert any("instead of lcm" in note for note in spec.notes)


def timesteps(spec: ModelSpec, size: int) -> list[list[float]]:
    """The timesteps of every stage."""
    time = timestep_of(sigma_table(spec) or ())
    return [[time(float(sigma)) for sigma in stage_sigmas(spec, stage)[:-1]] for stage in planned(spec, size).stages]


@pytest.mark.parametrize(
    ("profile", "base", "relay"),
    [
        ("lightning-1", [999], [999]),
        ("lightning-2", [999, 499], [499]),
        ("lightning-4", [999, 749, 499, 249], [499, 249]),
        ("lightning-8", [999, 874, 749, 624, 499, 374, 249, 124], [499, 374, 249, 124]),
        ("hyper-1", [800], [800]),
        ("hyper-1-lora", [999], [499]),
        ("hyper-cfg-12", [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82], [499, 416, 332, 249, 166, 82]),
        ("dmd2", [999, 749, 499, 249], [499, 249]),
        ("dmd2-1", [399], [399]),
        ("lcm", [999, 759, 499, 259], [339, 179]),
        ("tcd", [999, 759, 499, 259], [339, 179]),
    ],
)
def test_every_stage_takes_timesteps_that_the_network_knows(
    profile: str, base: list[int], relay: list[int], checkpoint: Get
) -> None:
    first, *later = timesteps(load_spec(str(checkpoint("sdxl").path), profile=profile), 4096)
    assert first == pytest.approx(base, abs=0.05)
    assert later
    for levels in later:
        assert levels == pytest.approx(relay, abs=0.05)


def test_an_lcm_runs_on_the_levels_that_comfyui_gives_it(checkpoint: Get) -> None:
    """With ModelSamplingDiscrete the schedules go over its 50 timesteps, without it over all 1000."""
    path = str(checkpoint("sdxl").path)
    for profile, levels in (("lcm", [14.61, 4.17, 1.67, 0.73]), ("none", [14.61, 4.09, 1.62, 0.70])):
        spec = load_spec(path, profile=profile)
        result = planned(spec, steps=4, sampler="lcm", schedule="sgm_uniform")
        assert stage_sigmas(spec, result.stages[0])[:-1].tolist() == pytest.approx(levels, abs=6e-3)
    simple = planned(load_spec(path, profile="lcm"), schedule="simple").stages[0]
    assert stage_sigmas(load_spec(path, profile="lcm"), simple).tolist() == pytest.approx(
        stage_sigmas(load_spec(path, profile="lcm"), planned(load_spec(path, profile="lcm")).stages[0]).tolist()
    )


def test_one_step_begins_at_the_noise_of_its_timestep(checkpoint: Get) -> None:
    """x = eps sqrt(1 + sigma^2); sigma eps would be a quarter too little at timestep 399."""
    for profile, wanted in (("dmd2-1", 1.53197), ("hyper-1", 5.20794), ("lightning-1", 14.64881)):
        spec = load_spec(str(checkpoint("sdxl").path), profile=profile)
        level = planned(spec).stages[0].sigma_start
        assert noisy(None, level, torch.ones(1)).item() == pytest.approx(wanted, abs=2e-5)


def test_the_one_step_lightning_draws_the_picture_itself(checkpoint: Get) -> None:
    spec = load_spec(str(checkpoint("sdxl").path), profile="lightning-1")
    assert spec.parameterisation == "x0"
    seen: list[tuple[float, float]] = []

    def network(x: torch.Tensor, time: float, cond: object) -> torch.Tensor:
        seen.append((x.mean().item(), time))
        return torch.full_like(x, 0.25)

    x = torch.full((1, 4, 8, 8), (spec.sigma_max**2 + 1) ** 0.5)
    assert preconditioned(spec, network)(x, spec.sigma_max, None).eq(0.25).all()
    assert seen == [(pytest.approx(1.0), 999.0)]


def test_only_an_lcm_keeps_its_boundary(checkpoint: Get) -> None:
    """Near t = 0 a consistency model gives x itself; DMD2, which uses the same sampler, its estimate."""
    x, sigma = torch.ones(1, 4, 8, 8), 0.0292
    kept, free = (
        preconditioned(load_spec(str(checkpoint("sdxl").path), profile=name), lambda x, time, cond: x * 0)(x, sigma, None)
        for name in ("lcm", "dmd2")
    )
    assert free.eq(1).all()
    assert not kept.eq(1).all()


def test_a_lightning_file_is_drawn_as_planned(tmp_path: Path, checkpoint: Get) -> None:
    made = checkpoint("sdxl")
    path = str(named(tmp_path, made, "tiny_lightning_2step"))
    result = hires.render("a", size="64x64", model=path, parts=made.parts)
    assert [stage.steps for stage in result.plan.stages] == [2]
    assert result.stats[0].tiles == 2, "guidance 1 evaluates once a step"
    tcd = hires.render("a", size="64x64", model=path, parts=made.parts, few_step="tcd", steps=2)
    assert (tcd.plan.stages[0].sampler, tcd.stats[0].tiles) == ("tcd", 2), "it knows the checkpoint's timesteps"
    asked = spec_for(RenderRequest(prompt="", size=Size(64, 64), model=path, parts=str(made.parts), few_step="none"))
    assert asked.defaults.steps == 30


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_published_name_tells_its_own_profile(profile: Profile) -> None:
    for name in profile.names:
        kind = "lora" if "lora" in name.lower() or name.startswith("pcm") else "model"
        found = match([(name, "its name")], kind)
        assert found is not None, name
        assert found.profile is profile, name
    profile.defaults.check()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny full LCM, whose UNet is told the guidance scale."""
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("told")
    made = make(folder, "sdxl", "folder")
    config = {key: value for key, value in made.network.config.items() if key != "_use_default_values"}
    config["time_cond_proj_dim"] = 256
    seeded(lambda: UNet2DConditionModel.from_config(config), 1).save_pretrained(folder / "unet")
    return folder


def test_a_full_lcm_is_told_the_guidance_scale(told: Path) -> None:
    spec = load_spec(str(told))
    assert spec.profile is not None
    assert (spec.profile.name, spec.defaults.guidance) == ("lcm", 8.0)
    assert "time_embedding.cond_proj" in spec.notes[-1]
    result = planned(spec, 64, negative="rain")
    assert result.costs[0].flops == planned(spec, 64, guidance=1.0).costs[0].flops, "one evaluation a step"
    assert any("no say: this LCM is told the guidance scale" in note for note in result.notes)
    with pytest.raises(RequestError, match="is told one guidance scale"):
        planned(spec, 64, stages=(StageSpec(size=Size(64, 64), guidance_rescale=0.5),))
    two, nine = (hires.render("a", size="64x64", model=str(told), steps=1, guidance=scale).pixels for scale in (2, 9))
    assert (two != nine).any()


def test_a_full_lcm_in_one_file_has_its_embedding_too() -> None:
    assert ldm_unet_names(["time_embedding.cond_proj"], 2) == {"time_embedding.cond_proj": "time_embed.cond_proj"}


def test_the_embedding_is_that_of_diffusers() -> None:
    from diffusers import LatentConsistencyModelPipeline

    wanted = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([7.0]), 256)
    torch.testing.assert_close(guidance_embedding(8.0, 256), wanted, rtol=0, atol=2e-4)
