"""PixArt end to end on tiny random weights: diffusers' pipelines at native size, tiles and exact sizes beyond it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hires
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from hires.devices.machines import host_device
from hires.devices.probe import TORCH_DTYPE
from hires.engine.requests import pooled_keys
from hires.errors import RequestError
from hires.events import Event
from hires.models.loading import load_autoencoder
from hires.options.render import RenderRequest
from hires.pipelines import progressive
from hires.pipelines.base import Family, Runtime
from hires.pipelines.pixart_sigma import PixArtSigma
from hires.planning.plan import DecodePlan
from hires.planning.planner import plan
from hires.sampling.guidance import Guidance, guided
from hires.sampling.noise import CanvasNoise, StepNoise
from hires.sampling.samplers import find_sampler
from hires.tiling.geometry import Box, Size
from hires.tiling.retry import Ladder
from hires.units import parse_bytes
from tests.support import checkpoints
from tests.support.tiny_pixart import latents, prompt, spec, transformer

CPU = torch.device("cpu")
DECODE = DecodePlan(policy="bands", band_rows=64, dtype="fp32")


def family(of: ModelSpec, network: torch.nn.Module, tokens: int, **options: Any) -> PixArtSigma:
    vae = load_autoencoder(of.path / "vae", TORCH_DTYPE["fp32"], CPU)
    runtime = Runtime(device=CPU, dtype="fp32", decode=Ladder([DECODE], str))
    texts = [prompt(9, tokens, 1), prompt(1, tokens, 2)]
    return PixArtSigma(Family.of(of, network, vae, runtime), texts, runtime, **options)


@pytest.mark.parametrize(
    ("name", "sample_size", "interpolation", "size", "steps"),
    [
        ("pixart-sigma-256", 32, 0.5, Size(256, 256), 20),
        ("pixart-sigma-512", 64, 1, Size(512, 512), 8),
        ("pixart-sigma-512", 64, 1, Size(448, 576), 20),
        ("pixart-alpha-256", 32, 1, Size(256, 256), 20),
        ("pixart-alpha-512", 64, 1, Size(512, 512), 8),
        ("pixart-alpha-1024", 128, 2, Size(320, 256), 20),
        ("pixart-alpha-1024", 128, 2, Size(1024, 1024), 4),
    ],
)
def test_the_latents_are_those_of_the_upstream_pipeline(
    demo: ModelSpec, name: str, sample_size: int, interpolation: float, size: Size, steps: int
) -> None:
    """DPM-Solver++ 2M from the same noise, prompts, masks and noise levels, with guidance 4.5."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

    of = spec(demo, name)
    network = transformer(sample_size, interpolation, sized=of.facts.size_conditions is not None, seed=3)
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    kind = PixArtSigmaPipeline if "sigma" in name else PixArtAlphaPipeline
    pipe = kind(tokenizer=None, text_encoder=None, vae=None, transformer=copy.deepcopy(network), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    start = latents(size.height // 8, size.width // 8)
    asked, against = prompt(9, of.facts.tokens, 1), prompt(1, of.facts.tokens, 2)
    expected = pipe(
        negative_prompt=None, num_inference_steps=steps, guidance_scale=4.5, height=size.height, width=size.width,
        latents=start.clone(), prompt_embeds=asked.tokens, prompt_attention_mask=asked.mask.long(),
        negative_prompt_embeds=against.tokens, negative_prompt_attention_mask=against.mask.long(),
        output_type="latent", use_resolution_binning=False, clean_caption=False,
    ).images  # fmt: skip
    ours = family(of, network, of.facts.tokens)
    for guidance, same in ((4.5, True), (4.4, False)):
        difference = (sampled(ours, start, scheduler.sigmas, size, guidance) - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5 if same else difference > 1e-3


def sampled(ours: PixArtSigma, start: torch.Tensor, sigmas: torch.Tensor, size: Size, guidance: float) -> torch.Tensor:
    conditional, unconditional = ours.conditions(size)
    x = start * float(sigmas[0] ** 2 + 1) ** 0.5  # from the variance-preserving scale to sigma's own
    noise = CanvasNoise(0, 0, Box(0, 0, 1, 1), 4)
    with torch.inference_mode():
        return find_sampler("dpmpp_2m")(
            guided(ours.denoiser(), unconditional, Guidance(low=guidance, high=guidance)),
            x,
            sigmas,
            conditional,
            StepNoise(source=noise),
        )


def test_a_plan_is_carried_out_in_tiles_to_the_size_asked_for(demo: ModelSpec) -> None:
    """From a bin through one relay to a canvas that no bin and no multiple of a tile gives."""
    of = spec(demo, "pixart-sigma-256")
    request = RenderRequest(prompt="a sun", size=Size(313, 555), steps=2, sampler="euler", attention_policy="global")
    made = plan(request, of, host_device(parse_bytes("2GiB")))
    assert made.canvas == Size(320, 560)
    assert made.stages[0].canvas == Size(192, 336)
    assert any("base picture 336x192 (bin 0.57), enlarged 1.67x" in note for note in made.notes)
    of = replace(of, defaults=replace(of.defaults, schedule="karras"))
    ours, events = family(of, transformer(32, 0.5), 300), list[Event]()
    result = progressive.run(ours, made, 5, events.append)
    assert result.latents.shape == (1, 4, 40, 70)
    assert made.latent_grid.count > 1
    with torch.inference_mode():
        rows = torch.cat(list(ours.decode_bands(result.latents, lambda done, total: None)), dim=-2)
    assert rows.shape == (1, 3, 320, 560)
    assert bool(rows.isfinite().all())
    assert ours.backends(made.latent_grid.tile) == (("attention", "sdpa"),)


def test_modes_are_named_and_change_what_a_tile_knows(demo: ModelSpec) -> None:
    of, x = spec(demo, "pixart-sigma-256"), latents(32, 32)
    found = {}
    pooled = pooled_keys(of)
    assert "approximation: keys and values averaged" in pooled.notes[-1]
    for model, options in ((of, {}), (of, {"position_mode": "local"}), (of, {"position_mode": "blend"}), (pooled, {})):
        ours = family(model, transformer(32, 0.5), 300, **options)
        conditional, _ = ours.conditions(Size(512, 512))
        with torch.inference_mode():
            found[len(found)] = ours.denoiser()(x, 1.0, conditional.crop(Box(32, 16, 32, 32)))
    values = list(found.values())
    assert all((a - b).abs().max() > 1e-5 for i, a in enumerate(values) for b in values[:i])
    for wrong, message in (
        ({"position_mode": "globl"}, "unknown position mode 'globl': did you mean 'global'"),
        ({"kv_compression": "conv3"}, "unknown kv compression"),
        ({"position_mode": "local"}, "position_mode local: is of PixArt models, demo is CosXL"),
        ({"kv_compression": "average"}, "kv_compression average: is of PixArt models"),
    ):
        with pytest.raises(RequestError, match=message):
            hires.plan(size="256x256", **wrong)


def test_the_resolution_is_told_to_the_models_that_were_trained_with_it(demo: ModelSpec) -> None:
    alpha, sigma = spec(demo, "pixart-alpha-1024"), spec(demo, "pixart-sigma-1024")
    told, _ = family(alpha, transformer(128, 2, sized=True), 120).conditions(Size(2048, 1024))
    assert told.resolution is not None and told.resolution.tolist() == [[2048, 1024]]
    assert told.canvas == Size(256, 128)
    assert family(sigma, transformer(128, 2), 300).conditions(Size(2048, 1024))[0].resolution is None


@pytest.mark.parametrize(("name", "kv"), [("pixart-sigma-256", {1: 2}), ("pixart-alpha-256", {})])
def test_an_original_file_is_rendered_at_the_size_asked_for(name: str, kv: dict[int, int], tmp_path: Path) -> None:
    """A .pth with the parts beside it, through the engine: T5, transformer with its own compression, tiles, decoder."""
    made = checkpoints.make(tmp_path, name, kv=kv)
    given = {"size": "301x157", "model": str(made.path), "parts": str(made.parts), "steps": 1, "sampler": "euler"}
    result = hires.render("a sun", family=name, **given)  # type: ignore[arg-type]
    assert result.pixels.shape == (157, 301, 3)
    assert result.plan.canvas == Size(160, 304)
    assert result.plan.backends == (("attention", "sdpa"),)
    assert load_spec(str(made.path), family=name, parts=str(made.parts)).network.kv_compression == ((1, 2) if kv else ())
