from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from hires.checkpoints.containers.layers import LayerCount
from hires.checkpoints.families import FAMILIES, VAE_COUNT, UNetShape
from hires.checkpoints.model import ModelSpec, sigma_max_for
from hires.devices import machines
from hires.devices.machines import described_card, host_device
from hires.errors import BudgetError, RequestError
from hires.kernels.attention_policies import NPA, Global, KVPool, Windows
from hires.options.render import RenderRequest
from hires.options.stage import StageSpec, WindowSpec
from hires.planning.costs.network_memory import text_live_bytes
from hires.planning.costs.text import choose_text
from hires.planning.planner import plan
from hires.sampling.registry import SAMPLER_FACTS, evaluations
from hires.tiling.bands.memory import VaeShape
from hires.tiling.geometry import Size
from hires.units import parse_bytes

COSXL = LayerCount(values=2_567_463_684, packable=2_565_857_280, rows=1_494_080, blocks=40_091_520, largest=29_491_200)


def request(size: Size, **options: object) -> RenderRequest:
    return RenderRequest(prompt="a sun", size=size, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def cosxl(demo: ModelSpec) -> ModelSpec:
    """The shapes and bytes of the full CosXL, no weights."""

    return replace(
        demo,
        name="cosxl",
        native_px=1024,
        align_px=32,
        network=UNetShape(
            channels=(320, 640, 1280), resnets=2, transformer_layers=(0, 2, 10), context_width=2048, latent_channels=4
        ),
        vae=VaeShape(channels=(128, 256, 512, 512), resnets=2, latent_channels=4, mid_attention=True),
        network_params=2_567_460_000,
        network_count=COSXL,
        vae_count=VAE_COUNT,
        text_params=817_720_000,
        vae_params=83_650_000,
        defaults=FAMILIES["cosxl"].defaults,
    )


@pytest.mark.parametrize(("side", "budget"), itertools.product((1024, 2048, 4096, 8192), ("8GB", "12GB", "16GB", "24GB")))
def test_every_common_card_has_a_plan_within_its_budget(cosxl: ModelSpec, side: int, budget: str) -> None:
    made = plan(request(Size(side, side)), cosxl, described_card(parse_bytes(budget)))
    assert made.peak_bytes <= parse_bytes(budget)
    assert made.stages[-1].canvas == Size(side, side)
    assert made.strategy == ("direct" if side == 1024 else "progressive")
    assert [c.stage for c in made.costs] == [*(s.name for s in made.stages), "decode", "text"]


def test_a_plan_says_why_and_is_json(demo: ModelSpec) -> None:
    made = plan(request(Size(1000, 1500)), demo, host_device(parse_bytes("2GiB")))
    text = made.explain()
    assert "canvas 1536x1024 is the next multiple of 64 px; 1500x1000 is cut from it" in text
    for word in ("strategy progressive", "dtype fp32", "8 pictures at once", "decode"):
        assert word in text
    document = json.loads(json.dumps(made.to_json()))
    assert document["output"] == {"height": 1000, "width": 1500}
    assert document["canvas"] == {"height": 1024, "width": 1536}
    assert document["stages"][0]["name"] == "base"
    assert document["latent_grid"]["canvas"] == {"height": 128, "width": 192}


def test_a_cpu_that_multiplies_bf16_is_told_of_and_counted(demo: ModelSpec) -> None:
    """float32 by itself on every CPU; in bf16 the network alone takes less time, where the CPU has it."""
    with_it, without = (replace(host_device(parse_bytes("2GiB")), bf16=here) for here in (True, False))
    of = {
        (dtype, device.bf16): plan(request(Size(1024, 1024), dtype=dtype), demo, device)
        for dtype in ("auto", "bf16")
        for device in (with_it, without)
    }
    assert [of["auto", here].dtype for here in (True, False)] == ["fp32", "fp32"]
    assert "`dtype` bf16" in of["auto", True].explain() and "`dtype` bf16" not in of["auto", False].explain()
    assert of["bf16", False].seconds == of["auto", False].seconds == of["auto", True].seconds
    single, half = ({cost.stage: cost.seconds for cost in of[dtype, True].costs} for dtype in ("auto", "bf16"))
    assert 0.6 * single["base"] < half["base"] < 0.8 * single["base"]
    assert half["decode"] == single["decode"]


@pytest.mark.parametrize(("flags", "here"), [("fma avx512_bf16 x", True), ("amx_tile amx_bf16", True), ("fma avx512f", False)])
def test_the_system_says_whether_the_cpu_multiplies_bf16(flags: str, here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines.Path, "read_text", lambda path: f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t: none\n")
    assert machines.multiplies_bf16.__wrapped__() is here


def test_where_the_system_does_not_tell_there_is_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(machines.Path, "read_text", absent)
    assert not machines.multiplies_bf16.__wrapped__() and machines.core_flops.__wrapped__() == machines.CORE_FLOPS[""]


@pytest.mark.parametrize(("flags", "rate"), [("avx2 avx512f", 100e9), ("avx avx2", 50e9), ("avx", 25e9)])
def test_a_core_is_as_fast_as_its_vectors_are_wide(flags: str, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines.Path, "read_text", lambda path: f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert machines.core_flops.__wrapped__() == rate


def test_a_smaller_budget_takes_smaller_batches_and_decode_tiles(cosxl: ModelSpec) -> None:
    size, tiles = Size(4096, 4096), {"attention_policy": "global"}
    rich = plan(request(size, **tiles), cosxl, described_card(parse_bytes("24GB")))
    poor = plan(request(size, **tiles), cosxl, described_card(parse_bytes("8GB")))
    assert poor.batch < rich.batch
    assert poor.peak_bytes < rich.peak_bytes
    assert [replace(s, batch=1) for s in poor.stages] == [replace(s, batch=1) for s in rich.stages]  # how, not what


def test_an_impossible_budget_names_the_one_that_would_do(cosxl: ModelSpec) -> None:
    with pytest.raises(BudgetError, match=r"needs .* MiB, budget 286.1 MiB: `vram` (\d+\.\d)GB would do") as caught:
        plan(request(Size(2048, 2048)), cosxl, described_card(parse_bytes("300MB")))
    named = str(caught.value).split("`vram` ")[1].split(" ")[0]
    plan(request(Size(2048, 2048)), cosxl, described_card(parse_bytes(named)))


def test_strategies_are_what_was_asked_for(demo: ModelSpec) -> None:
    device = host_device(parse_bytes("2GiB"))
    tiled = plan(request(Size(1024, 1024), strategy="tiled"), demo, device)
    assert len(tiled.stages) == 1
    assert tiled.latent_grid.count == 25
    direct = plan(request(Size(1024, 1024), strategy="direct"), demo, device)
    assert direct.latent_grid.count == 1
    assert plan(request(Size(256, 256), strategy="progressive"), demo, device).strategy == "direct"


def test_a_policy_of_attention_takes_the_canvas_in_one_piece_and_is_named(cosxl: ModelSpec) -> None:
    card = described_card(parse_bytes("24GB"))
    tiled, made = (plan(request(Size(4096, 4096), attention_policy=p), cosxl, card) for p in ("global", "npa"))
    assert [stage.attention for stage in made.stages] == [Global(), NPA(128), NPA(128)]
    assert all(stage.grid.count == 1 for stage in made.stages) and tiled.latent_grid.count == 25
    assert made.costs[2].flops < 0.7 * tiled.costs[2].flops
    note = "approximation: self-attention attends to a neighbourhood of 1024 px over the whole canvas, as asked for"
    assert f"{note} (refine 1, refine 2)" in made.notes
    assert json.loads(json.dumps(made.to_json()))["stages"][1]["attention"] == "npa:128"
    moving = plan(request(Size(2048, 2048), attention_policy="windows:512+shift", sampler="euler"), cosxl, card).stages[1]
    assert (moving.attention, moving.shift_cells) == (Windows(64), 16)
    direct = plan(request(Size(2048, 2048), attention_policy="proportional", strategy="direct"), cosxl, card)
    assert direct.stages[0].attention == Global(trained=128 * 128)
    pooled = plan(request(Size(2048, 2048), attention_policy="kvpool"), cosxl, card)
    assert pooled.stages[1].attention == KVPool(2) and any("averaged 2 x 2" in note for note in pooled.notes)
    native = plan(request(Size(1024, 1024), attention_policy="npa"), cosxl, card)
    assert native.stages[0].attention == Global() and any("changes nothing" in note for note in native.notes)


@pytest.mark.parametrize(("options", "said"), [
    ({"attention_policy": "npa:20"}, "a window of 128 px or more"),
    ({"attention_policy": "npa", "tile_px": 512}, "leave `tile_px`"),
    ({"attention_policy": "npa", "overlap_px": 0}, "leave `tile_px`"),
    ({"attention_policy": "npa", "strategy": "tiled"}, "leave `tile_px`"),
    ({"attention_policy": "npa+shift", "sampler": "dpmpp_2m"}, "take a single-step sampler"),
    *(({"attention_policy": name}, "give one of global, npa")
      for name in ("local", "npa:", "npa:x", "npa:0", "global:4", "kvpool:2+shift", "NPA", "npa:-4", "")),
])  # fmt: skip
def test_a_policy_that_cannot_be_is_refused(cosxl: ModelSpec, options: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        plan(request(Size(4096, 4096), **options), cosxl, described_card(parse_bytes("24GB")))


def test_sampler_and_schedule_are_named_with_their_reason(demo: ModelSpec) -> None:
    device, size = host_device(parse_bytes("2GiB")), Size(512, 512)
    own = plan(request(size), demo, device)
    assert [(stage.sampler, stage.schedule) for stage in own.stages] == [("euler_ancestral", "karras"), ("dpmpp_2m", "karras")]
    assert {
        "sampler euler_ancestral: the model's own; schedule karras: the model's own",
        "refined by dpmpp_2m: the model's own",
    } <= set(own.notes)
    asked = plan(request(size, sampler="DPM++ 2M", schedule="exp"), demo, device)
    assert {(stage.sampler, stage.schedule) for stage in asked.stages} == {("dpmpp_2m", "exponential")}
    assert "sampler dpmpp_2m: as asked for; schedule exponential: as asked for" in asked.notes
    assert "steps of dpmpp_2m on exponential from sigma" in asked.explain()
    assert plan(request(size, sampler="DPM++ 3M SDE"), demo, device).stages[0].schedule == "karras"
    vp = replace(demo, parameterisation="eps")
    made = plan(request(size, sampler="DPM++ 3M SDE"), vp, device)
    assert made.stages[0].schedule == "exponential"
    assert any("what DPM++ 3M SDE is usually run on" in note for note in made.notes)


def test_the_plan_counts_evaluations_and_flags_an_estimate(demo: ModelSpec) -> None:
    device, size = host_device(parse_bytes("2GiB")), Size(256, 256)
    flops = {
        name: plan(request(size, sampler=name, steps=12), demo, device).costs[0].flops
        for name in SAMPLER_FACTS
        if name != "tcd"
    }
    for name, cost in flops.items():
        assert cost / flops["euler"] == pytest.approx(evaluations(name, 12) / 12)
    assert not any("estimate" in note for note in plan(request(size, sampler="heun"), demo, device).notes)
    assert any("are an estimate" in note for note in plan(request(size, sampler="dpm_adaptive"), demo, device).notes)


def test_combinations_that_do_not_fit_are_refused_in_the_plan(demo: ModelSpec) -> None:
    device, size = host_device(parse_bytes("2GiB")), Size(256, 256)
    with pytest.raises(RequestError, match=r"schedule beta is made of .*take exponential"):
        plan(request(size, schedule="beta"), demo, device)
    with pytest.raises(RequestError, match="sampler tcd counts a checkpoint's 1000 timesteps; this one is edm_v"):
        plan(request(size, sampler="TCD"), demo, device)
    anyone = plan(request(size, sampler="LCM"), demo, device)
    assert any("sampler lcm is made for few-step models" in note for note in anyone.notes)
    betas = ("scaled_linear", 0.00085, 0.012)
    turbo = replace(demo, parameterisation="eps", vp_betas=betas, facts=replace(demo.facts, few_step="turbo"), sigma_max=14.6)
    assert plan(request(size, schedule="trailing", steps=1), turbo, device).stages[0].schedule == "trailing"
    asked = plan(request(size, schedule="sd_turbo", steps=4), turbo, device)
    assert any("on sd_turbo, as asked for: this few-step model was distilled for" in note for note in asked.notes)
    trailing = replace(turbo, defaults=replace(turbo.defaults, schedule="trailing"))
    assert plan(request(size, sampler="DPM++ 2M"), trailing, device).stages[0].schedule == "trailing"
    one = replace(demo.defaults, steps=1, relay_steps=(4,))
    dmd = replace(turbo, facts=replace(demo.facts, few_step="dmd"), defaults=one)
    assert plan(request(size), dmd, device).stages[0].steps == 1
    with pytest.raises(RequestError, match="steps 4: a DMD checkpoint"):
        plan(request(Size(512, 512)), dmd, device)


def test_who_says_by_what_sampler_a_picture_is_refined(demo: ModelSpec) -> None:
    """The stage, the relay, the request, the model's relay_sampler, its sampler; the last where tiles move."""
    device, size = host_device(parse_bytes("2GiB")), Size(512, 512)

    def refined(spec: ModelSpec = demo, **options: object) -> str:
        return plan(request(size, **options), spec, device).stages[-1].sampler

    moving = StageSpec(windows=WindowSpec(tile_px=256, overlap_px=0, blend="box", shift=True))
    assert refined() == "dpmpp_2m" and refined(relay=moving) == "euler_ancestral"
    assert refined(schedule="exponential") == "dpmpp_2m"
    assert refined(sampler="heun") == "heun" and refined(sampler="heun", relay=StageSpec(sampler="ddim")) == "ddim"
    assert refined(replace(demo, defaults=replace(demo.defaults, relay_sampler=()))) == "euler_ancestral"
    with pytest.raises(RequestError, match="sampler dpmpp_2m reuses estimates"):
        refined(sampler="dpmpp_2m", relay=moving)
    with pytest.raises(ValueError, match=r"relay_sampler .*'best'.* is unknown"):
        replace(demo.defaults, relay_sampler=("best",)).check()


def test_tile_and_overlap_are_taken_and_checked(demo: ModelSpec) -> None:
    device = host_device(parse_bytes("2GiB"))
    made = plan(request(Size(1024, 1024), tile_px=384, overlap_px=128), demo, device)
    assert made.latent_grid.tile == Size(48, 48)
    with pytest.raises(RequestError, match="overlap_px 384: must be below the tile of 384 px"):
        plan(request(Size(1024, 1024), tile_px=384, overlap_px=384), demo, device)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": -3}, "steps -3"),
        ({"steps": 0}, "steps 0"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"sampler": "ddpm"}, "unknown sampler 'ddpm'"),
        ({"sampler": 3}, "sampler 3: give a name"),
        ({"schedule": "karas"}, "unknown schedule 'karas': did you mean 'karras'"),
        ({"sampler": "Euler a Karras", "schedule": "exponential"}, "says karras and `schedule` says exponential"),
        ({"strategy": "tile"}, "unknown strategy 'tile': did you mean 'tiled'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"seed": -1}, "seed -1"),
        ({"tile_px": 0}, "tile_px 0"),
        ({"overlap_px": -8}, "overlap_px -8"),
    ],
)
def test_bad_values_name_themselves(options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        request(Size(512, 512), **options)


@pytest.mark.parametrize(
    ("text", "count"), [("24GB", 24 * 10**9), ("12GiB", 12 * 2**30), ("1.5 gb", 15 * 10**8), ("4096", 4096)]
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "12 bananas", "0", "nan"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="no amount of memory"):
        parse_bytes(text)


def test_the_ladder_steps_down_and_never_changes_the_picture(demo: ModelSpec) -> None:
    made = plan(request(Size(4096, 4096)), demo, host_device(parse_bytes("2GiB")))
    batches = [rung.batch for rung in made.ladder if rung.stage == "denoise"]
    peaks = [rung.peak_bytes or 0 for rung in made.ladder if rung.stage == "decode"]
    assert batches == sorted(batches, reverse=True)
    assert batches[-1] == 1
    assert peaks == sorted(peaks, reverse=True)
    assert len(peaks) >= 3
    assert all(rung.exact for rung in made.ladder)


def test_no_operator_of_a_plan_is_handed_more_than_32_bits_can_count(cosxl: ModelSpec) -> None:
    device = described_card(10**14)
    made = {side: plan(request(Size(side, side)), cosxl, device) for side in (2048, 4096)}
    assert made[2048].decode.policy == "whole"
    assert made[4096].decode.policy == "bands"
    assert all(rung.decode.policy != "whole" for rung in made[4096].ladder)


def test_sigma_max_goes_with_the_size_when_asked_to(cosxl: ModelSpec) -> None:
    card, full = described_card(parse_bytes("24GB")), replace(cosxl, sigma_min=0.002, sigma_max=120.0)

    def start(side: int, sigma_max: float | str | None) -> float:
        return plan(request(Size(side, side), sigma_max=sigma_max, strategy="direct"), full, card).stages[0].sigma_start

    assert start(1024, None) == 120.0
    assert start(1024, "auto") == pytest.approx(14.6)
    assert start(2048, "auto") == pytest.approx(29.2)
    assert start(2048, 60) == 60.0
    assert sigma_max_for(full, Size(1024, 8192)) == pytest.approx(116.8)
    assert sigma_max_for(full, Size(16384, 8192)) == 120.0
    text = plan(request(Size(4096, 4096), sigma_max="auto"), full, card).explain()
    assert "starts from sigma 14.6 instead of the checkpoint's 120: what goes with the size" in text
    with pytest.raises(RequestError, match=r"sigma_max 200: .* from 0.002 to 120; give a level between, such as 14.6"):
        start(1024, 200)


@pytest.mark.parametrize("value", ["high", -1.0, 0, float("nan"), True, 1e9])
def test_a_sigma_max_that_is_none_names_itself(value: object) -> None:
    with pytest.raises(RequestError, match="sigma_max"):
        request(Size(512, 512), sigma_max=value)


def test_a_variance_preserving_model_has_no_other_sigma_max(cosxl: ModelSpec) -> None:
    sdxl = replace(cosxl, name="sdxl", vp_betas=FAMILIES["sdxl"].betas, sigma_max=14.61)
    for value in ("auto", 10.0):
        with pytest.raises(RequestError, match=r"sdxl is variance-preserving, its 1000 noise levels end at 14.61"):
            plan(request(Size(1024, 1024), sigma_max=value), sdxl, described_card(parse_bytes("24GB")))


def test_a_plan_says_which_picture_is_rendered_and_how_far_it_is_enlarged(cosxl: ModelSpec) -> None:
    text = plan(request(Size(4096, 4096)), cosxl, described_card(parse_bytes("24GB"))).explain()
    assert "base picture 1024x1024 (bin 1.00), enlarged 4.00x to the canvas 4096x4096, refined in 2 stages" in text


def test_a_cpu_budget_that_nobody_gave_grows_where_nothing_fits(cosxl: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hires.devices.machines.available_host_bytes", lambda: 30 * 2**30)
    made = plan(request(Size(2048, 2048)), cosxl, host_device())
    weights = 4 * (cosxl.network_params + cosxl.vae_params)
    assert 2 * 2**30 < made.peak_bytes <= made.budget_bytes == 24 * 2**30 - weights
    assert "2.00 GiB is too small" in made.notes[-1]
    with pytest.raises(BudgetError, match="would do"):
        plan(request(Size(2048, 2048)), cosxl, host_device(2 * 2**30))
    monkeypatch.setattr("hires.devices.machines.available_host_bytes", lambda: 3 * 2**30)
    with pytest.raises(BudgetError, match="would do"):
        plan(request(Size(4096, 4096)), cosxl, host_device())


def test_t5_is_weighed_against_host_memory_where_it_runs_there(demo: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    sigma = replace(demo, facts=replace(demo.facts, text=("t5",), tokens=300), text_params=4_762_000_000)
    monkeypatch.setattr("hires.devices.machines.available_host_bytes", lambda: 30 * 2**30)
    size, small, large = Size(256, 256), parse_bytes("8GB"), parse_bytes("24GB")
    on_card = choose_text(sigma, described_card(large), "bf16")
    assert not on_card.on_host
    assert on_card.cost.peak_bytes == 2 * 4_762_000_000 + text_live_bytes(("t5",), 2, 300, 2)
    assert not choose_text(sigma, described_card(on_card.cost.peak_bytes), "bf16").on_host
    assert choose_text(sigma, described_card(on_card.cost.peak_bytes - 1), "bf16").on_host
    assert choose_text(sigma, described_card(large), "fp16").dtype == "bf16"
    assert choose_text(sigma, host_device(small), "fp32").dtype == "fp32"
    monkeypatch.setattr("hires.devices.machines.available_host_bytes", lambda: 16 * 2**30)
    assert choose_text(sigma, host_device(small), "fp32").dtype == "bf16"
    assert any("text encoders in bf16" in note for note in plan(request(size), sigma, host_device(small)).notes)
    monkeypatch.setattr("hires.devices.machines.available_host_bytes", lambda: 8 * 2**30)
    with pytest.raises(BudgetError, match=r"text encoders need 8\.87 GiB of host memory in bf16, 8\.00 GiB are free"):
        plan(request(size), sigma, host_device(small))


def test_where_nothing_exact_fits_a_smaller_window_is_an_approximation_that_is_asked_for(cosxl: ModelSpec) -> None:
    tight = described_card(parse_bytes("900MB"))
    with pytest.raises(BudgetError, match="or another picture with `weights` int8: `allow_approximate`"):
        plan(request(Size(2048, 2048), attention_policy="npa"), cosxl, tight)
    packed = plan(request(Size(2048, 2048), attention_policy="npa", allow_approximate=True), cosxl, tight)
    assert packed.weights == "int8" and packed.latent_grid.count == 1 and packed.peak_bytes <= tight.budget_bytes
    note = next(note for note in packed.notes if note.startswith("approximation: weights of the network in 8 bits (int8)"))
    assert note.endswith("because nothing exact has room and `allow_approximate` was given")
    tight = described_card(parse_bytes("800MB"))
    made = plan(request(Size(2048, 2048), attention_policy="npa", allow_approximate=True), cosxl, tight)
    assert made.weights is None and made.latent_grid.count > 1 and made.peak_bytes <= tight.budget_bytes
    assert any(note.startswith("approximation: tiles instead of the canvas") for note in made.notes)
    plain = plan(request(Size(2048, 2048), allow_approximate=True), cosxl, described_card(parse_bytes("24GB")))
    assert not any("has room" in note for note in plain.notes), "what fits is not cut"
    tiny = described_card(parse_bytes("340MB"))
    for allowed in (False, True):  # the base picture itself has no room, and nobody advises what would be refused
        with pytest.raises(BudgetError, match=r"MiB, budget 324.2 MiB: `vram` \S+ would do$"):
            plan(request(Size(2048, 2048), allow_approximate=allowed), cosxl, tiny)
    small = plan(request(Size(2048, 2048), strategy="tiled", allow_approximate=True), cosxl, tiny)
    assert small.latent_grid.tile == Size(64, 64) and small.peak_bytes <= tiny.budget_bytes
    assert any(note.startswith("approximation: tiles of 512 px") for note in small.notes)
