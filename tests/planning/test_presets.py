"""Presets, stages as data and as text: what is said, what stands behind it, what it costs."""

from __future__ import annotations

import math

import pytest

import hires
from benchmarks.full_size import full_spec
from benchmarks.suites.presets import LIMITS, planned, row_of
from hires.checkpoints.model import ModelSpec
from hires.devices.machines import described_card, host_device
from hires.errors import RequestError
from hires.kernels.attention_policies import NPA, Global, Windows
from hires.options.render import PRESETS, RenderRequest
from hires.options.stage import GuidePlan, StageSpec, WindowSpec
from hires.options.stage_text import parse_stage
from hires.planning.costs.evaluations import estimates, stage_levels
from hires.planning.plan import MemoryPlan
from hires.planning.planner import plan
from hires.planning.presets import preset
from hires.tiling.geometry import Size
from hires.units import parse_bytes

CARD = described_card(parse_bytes("24GB"))
SPOT = WindowSpec(tile_px=512, overlap_px=0, blend="box", shift=True)


def made(size: Size, family: str = "cosxl", **options: object) -> MemoryPlan:
    return plan(RenderRequest(prompt="", size=size, **options), full_spec(family), CARD)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "name", "side"), LIMITS)
def test_presets_cost_no_more_than_they_may(family: str, name: str, side: int) -> None:
    flops = planned(family, name, side).flops
    assert 0.3 * LIMITS[family, name, side] <= flops / 1e15 <= LIMITS[family, name, side]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "side"), LIMITS)
def test_what_a_preset_costs_is_what_full_size_networks_compute(family: str, name: str, side: int) -> None:
    row = row_of(family, name, side)
    assert row["within"], row


@pytest.mark.parametrize("family", ["cosxl", "pixart-sigma-1024"])
def test_a_preset_is_more_work_than_the_one_before(family: str) -> None:
    for side in (2048, 4096, 8192):
        flops = [planned(family, name, side).flops for name in PRESETS]
        assert flops == sorted(flops) and flops[0] < 0.8 * flops[1] < 0.8 * flops[2]


def test_balanced_is_stages_of_twice_the_side_held_to_the_base_picture() -> None:
    found = made(Size(4096, 4096))
    assert [(s.canvas.width, s.steps, s.guidance, s.attention) for s in found.stages] == [
        (1024, 30, 7.0, Global()),
        (2048, 10, 4.0, NPA(128)),
        (4096, 8, 4.0, NPA(128)),
    ]
    assert [s.guides for s in found.stages] == [(), (GuidePlan(cutoff=0.25),), (GuidePlan(cutoff=0.125),)]
    assert [s.sigma_end for s in found.stages] == [0.0, 0.03, 0.03]
    assert "preset balanced: 2.56 PFLOP in all" in found.explain()
    assert any("as preset balanced has it (refine 1, refine 2)" in note for note in found.notes)
    fast = made(Size(4096, 4096), preset="fast")
    assert [(s.canvas.width, s.steps, s.guidance) for s in fast.stages] == [(1024, 30, 7.0), (4096, 4, 1.0)]


def test_pixart_of_2k_refines_in_windows_of_1024_px_but_for_best() -> None:
    windows = {name: made(Size(4096, 4096), "pixart-sigma-2k", preset=name).stages[1].attention for name in PRESETS}
    assert windows == {"fast": NPA(128), "balanced": NPA(128), "best": NPA(256)}


def test_the_estimates_of_an_interval_are_counted() -> None:
    stage = made(Size(2048, 2048)).stages[1]
    levels = stage_levels(full_spec("cosxl"), stage)
    assert levels[0] == 1.0 and levels[-2] == pytest.approx(0.03) and levels[-1] == 0.0
    assert estimates(stage, full_spec("cosxl")) == [2 if level > 0.28 else 1 for level in levels[:-1]]
    assert 1 in estimates(stage, full_spec("cosxl")) and 2 in estimates(stage, full_spec("cosxl"))


def test_what_has_no_room_in_one_piece_is_in_tiles_and_says_so() -> None:
    size, card = Size(8192, 8192), described_card(parse_bytes("8GB"))
    found = plan(RenderRequest(prompt="", size=size), full_spec("cosxl"), card)
    assert [stage.grid.count > 1 for stage in found.stages] == [False, False, False, True]
    (note,) = (note for note in found.notes if "in tiles instead of one piece" in note)
    assert note.startswith("approximation: refine 3") and "another picture" in note
    assert found.peak_bytes <= parse_bytes("8GB")
    tiles = plan(RenderRequest(prompt="", size=size, attention_policy="global"), full_spec("cosxl"), CARD)
    assert all(stage.attention == Global() for stage in tiles.stages) and tiles.latent_grid == found.latent_grid


def test_whoever_asks_for_tiles_has_tiles() -> None:
    for options in ({"tile_px": 1024}, {"overlap_px": 128}, {"strategy": "tiled"}, {"attention_policy": "global"}):
        found = made(Size(2048, 2048), **options)
        assert found.stages[-1].attention == Global() and found.latent_grid.count > 1, options


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", StageSpec()),
        ("2048x1024", StageSpec(size=Size(1024, 2048))),
        ("sigma=1:0.03, steps=8", StageSpec(renoise="fixed", sigma_start=1.0, sigma_end=0.03, steps=8)),
        ("sigma=area:0.57", StageSpec(renoise="area", sigma_start=0.57)),
        ("guide=none", StageSpec(guides=())),
        ("guide=structure:0.125+pull", StageSpec(guides=(GuidePlan(cutoff=0.125), GuidePlan(kind="pull")))),
        ("attention=npa:512+shift", StageSpec(attention="npa:512+shift")),
        (
            "tile=512,overlap=0,blend=box,move=yes",
            StageSpec(windows=WindowSpec(tile_px=512, overlap_px=0, blend="box", shift=True)),
        ),
        ("guidance=4,high=7,rescale=0.7", StageSpec(guidance=4.0, guidance_high=7.0, guidance_rescale=0.7)),
        ("interval=0.28:", StageSpec(guidance_interval=(0.28, math.inf))),
        ("sampler=DPM++ 2M Karras,enlarger=lanczos", StageSpec(sampler="DPM++ 2M Karras", enlarger="lanczos")),
    ],
)
def test_a_stage_as_text(text: str, wanted: StageSpec) -> None:
    assert parse_stage(text) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz=8", "did you mean 'steps'"),
        ("steps=many", "steps=many is not understood"),
        ("steps=0", "steps=0"),
        ("sigma=-1", "sigma_start=-1"),
        ("sigma=inf", "sigma_start=inf"),
        ("sigma=nan", "sigma_start=nan"),
        ("guide=push", "'push'"),
        ("guide=structure:0.9", "cutoff 0.9"),
        ("enlarger=magic", "'magic'"),
        ("blend=round", "'round'"),
        ("attention=npa,tile=512", "goes over the whole canvas"),
        ("attention=nope", "nope"),
        ("interval=2:1", "interval=2:1"),
        ("move=maybe", "move=maybe is not understood"),
        ("12x", "'12x'"),
        ("rescale=1.5", "guidance_rescale=1.5"),
    ],
)
def test_a_stage_that_is_not_understood_names_it(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words.replace("(", r"\(")):
        parse_stage(text)


def test_what_is_said_of_the_relay_comes_before_the_preset() -> None:
    relay = parse_stage("sigma=1.5,steps=3,guide=pull,guidance=2,high=3,interval=0.1:1,enlarger=latent,attention=windows:512")
    base, *later = made(Size(4096, 4096), relay=relay).stages
    assert base.steps == 30 and base.guidance == 7.0 and base.guides == ()
    for stage in later:
        assert (stage.sigma_start, stage.steps, stage.enlarger, stage.attention) == (1.5, 3, "latent", Windows(64))
        assert (stage.guidance, stage.guidance_high, stage.guidance_interval) == (2.0, 3.0, (0.1, 1.0))
        assert [guide.kind for guide in stage.guides] == ["pull"]
    tiles = made(Size(2048, 2048), relay=parse_stage("tile=1024,overlap=0,blend=box,move=yes")).stages[1]
    assert (tiles.blend, tiles.grid.count, tiles.shift_cells, tiles.attention) == ("box", 4, 64, Global())
    area = made(Size(4096, 4096), relay=parse_stage("sigma=area:0.572")).stages
    assert [stage.sigma_start for stage in area[1:]] == pytest.approx([0.572 * 2**0.75] * 2)


def test_stages_one_by_one() -> None:
    stages = tuple(
        parse_stage(text) for text in ("1024x1024,steps=12,sigma=60", "2048x2048,steps=5", "4096x4096,steps=2,sigma=0.5")
    )
    found = made(Size(4096, 4096), stages=stages, relay=parse_stage("guidance=3"))
    assert [(s.canvas.width, s.steps, s.sigma_start, s.guidance) for s in found.stages] == [
        (1024, 12, 60.0, 7.0),
        (2048, 5, 1.0, 3.0),
        (4096, 2, 0.5, 3.0),
    ]
    assert found.strategy == "progressive"


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (("1024x1024", "steps=8"), "stages 2: give its size"),
        (("1024x1024", "2048x2048"), "the last is 2048x2048"),
        (("2048x2048", "1024x1024", "4096x4096"), "do not grow"),
        (("1024x1024", "4096x4096,sigma=900"), "sigma=900"),
    ],
)
def test_stages_that_do_not_lead_to_the_picture_are_refused(stages: tuple[str, ...], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        made(Size(4096, 4096), stages=tuple(map(parse_stage, stages)))


def test_what_a_model_cannot_take_is_refused() -> None:
    with pytest.raises(RequestError, match="goes down a checkpoint's timesteps"):
        made(Size(2048, 2048), "pixart-sigma-1024", relay=parse_stage("sigma=1:0.1"))
    with pytest.raises(RequestError, match="of text guidance"):
        made(Size(2048, 2048), "cosxl-edit", relay=parse_stage("high=9"))
    with pytest.raises(RequestError, match="strategy tiled"):
        made(Size(2048, 2048), strategy="tiled", stages=(parse_stage("1024x1024"), parse_stage("2048x2048")))
    with pytest.raises(RequestError, match="give a stage of a size with `stages`"):
        hires.plan(size="512x512", relay="512x512,steps=2")
    with pytest.raises(RequestError, match="did you mean 'balanced'"):
        hires.plan(size="512x512", preset="balance")


def test_a_few_step_model_takes_the_steps_it_was_distilled_for() -> None:
    spec = full_spec("sdxl-lcm")
    steps = {name: [stage.steps for stage in preset(name, spec).stages] for name in PRESETS}
    assert steps == {name: [4, 2] for name in PRESETS}
    assert {stage.attention for name in PRESETS for stage in preset(name, spec).stages[1:]} == {"npa:1024"}


def test_every_family_has_every_preset() -> None:
    from hires.checkpoints.families import FAMILIES

    for family in FAMILIES:
        for name in PRESETS:
            found = preset(name, full_spec(family))
            assert found.stages[0].steps and all(s.steps and s.sigma_start and s.enlarger for s in found.stages[1:])


def test_the_shipped_model_keeps_its_tiles(demo: ModelSpec) -> None:
    found = {
        name: plan(RenderRequest(prompt="", size=Size(1024, 1024), preset=name), demo, host_device()).stages for name in PRESETS
    }
    assert {name: [stage.steps for stage in stages] for name, stages in found.items()} == {
        "fast": [24, 3],
        "balanced": [24, 6, 6],
        "best": [40, 12, 12],
    }
    whole = plan(RenderRequest(prompt="", size=Size(4096, 4096)), demo, host_device()).stages
    assert [stage.enlarger for stage in whole] == [None, "unsharp", "unsharp", "pixel", "pixel"]
    assert [stage.sampler for stage in whole][1:] == ["dpmpp_2m", "dpmpp_2m", "euler_ancestral", "euler_ancestral"]
    assert [stage.steps for stage in whole] == [24, 6, 6, 6, 6]
    assert all(stage.attention == Global() for stages in found.values() for stage in stages)
    assert all(stage.grid.count > 1 for stages in found.values() for stage in stages[1:])
