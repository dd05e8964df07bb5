"""Law 6 where it begins: no size is ever changed on the way."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hires.checkpoints.configs import shipped_config
from hires.checkpoints.families import FAMILIES, FamilyFacts
from hires.checkpoints.spec import align_of, load_spec, unet_shape
from hires.devices.machines import described_card
from hires.errors import SizeError
from hires.options.render import RenderRequest
from hires.options.sizes import check_size, parse_size
from hires.planning import planner
from hires.planning.explain import relay_note
from hires.planning.resolution import SIZE_CLASSES, aspect_bins, base_canvas, bins_for, make_bins, nearest_bin, stage_canvases
from hires.tiling.geometry import Size, cover, relay_view, snap
from tests.support.checkpoints import Checkpoint
from tests.support.speed import examples


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096x2160", Size(2160, 4096)), (" 640 X 480 ", Size(480, 640)), ("800×600", Size(600, 800)), ("1024", Size(1024, 1024))],
)
def test_width_comes_first_in_text_only(text: str, size: Size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["0x0", "100x", "99999999x8", "x100", "", "12.5x3", "-64x64", "64x64x64", "100x1", "9" * 40 + "x64"]
)
def test_what_is_no_size_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(SizeError, match=r"size"):
        parse_size(text)


def test_more_pixels_than_any_plan_reaches_are_refused() -> None:
    with pytest.raises(SizeError, match="megapixels"):
        check_size(Size(131_072, 131_072))


@given(st.integers(16, 9000), st.integers(16, 9000), st.sampled_from([8, 32, 64]))
def test_a_snapped_canvas_holds_the_size(h: int, w: int, align: int) -> None:
    canvas = snap(Size(h, w), align)
    assert canvas.height % align == 0
    assert canvas.width % align == 0
    assert 0 <= canvas.height - h < align
    assert 0 <= canvas.width - w < align


def test_cover_never_returns_another_size() -> None:
    """20,000 sizes, the ones that break other tools (392x720 from a 720x1280 bin) among them."""
    rng = random.Random(0)
    cases = [(Size(720, 1280), Size(720, 392))]
    cases += [
        (Size(rng.randint(1, 3000), rng.randint(1, 3000)), Size(rng.randint(1, 9000), rng.randint(1, 9000)))
        for _ in range(20_000)
    ]
    for source, target in cases:
        resized, box = cover(source, target)
        assert (box.height, box.width) == (target.height, target.width)
        assert box.top >= 0
        assert box.left >= 0
        assert box.bottom <= resized.height
        assert box.right <= resized.width
        assert resized.height == target.height or resized.width == target.width


@given(st.integers(64, 16384), st.integers(64, 16384))
def test_stages_at_most_about_double_and_end_at_the_canvas(h: int, w: int) -> None:
    bins = make_bins(256, 32)
    canvas = snap(Size(h, w), 32)
    stages = stage_canvases(canvas, bins, 32)
    assert stages[-1] == canvas
    areas = [stage.area for stage in stages]
    assert areas == sorted(areas)
    for small, large in itertools.pairwise(stages):
        coarse = min(small.height, small.width) < 128  # rounding to 32 px weighs more on a thin strip
        assert large.area <= (9 if coarse else 4.9) * small.area
    ratios = [math.log(stage.width / stage.height * h / w) for stage in stages if min(stage.height, stage.width) > 64]
    assert all(abs(ratio) < 0.5 for ratio in ratios)  # little is cropped away between stages
    assert all(stage.height % 32 == 0 and stage.width % 32 == 0 for stage in stages)


def test_the_common_sizes_double_exactly() -> None:
    sides = [stage.height for stage in stage_canvases(Size(8192, 8192), make_bins(256, 32), 32)]
    assert sides == [256, 512, 1024, 2048, 4096, 8192]
    assert [str(s) for s in stage_canvases(Size(4096, 4096), make_bins(1024, 64), 32)] == [
        "1024x1024",
        "2048x2048",
        "4096x4096",
    ]


def test_bins_treat_portrait_and_landscape_alike() -> None:
    bins = make_bins(1024, 64)
    assert nearest_bin(Size(1024, 1024), bins) == Size(1024, 1024)
    wide, tall = nearest_bin(Size(1080, 1920), bins), nearest_bin(Size(1920, 1080), bins)
    assert abs(wide.height / wide.width - tall.width / tall.height) < 0.1
    assert all(0.85 < b.area / 1024**2 < 1.15 for b in bins)


def upstream_table(size_class: int) -> dict[str, list[float]]:
    """diffusers' table of that class; Sana's for 4096. 2880 has none."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
    from diffusers.pipelines.sana import pipeline_sana

    home = {2048: pipeline_pixart_sigma, 4096: pipeline_sana}.get(size_class, pipeline_pixart_alpha)
    table: dict[str, list[float]] = getattr(home, f"ASPECT_RATIO_{size_class}_BIN")
    return table


@pytest.mark.parametrize(("size_class", "count"), [(256, 33), (512, 33), (1024, 33), (2048, 40), (4096, 40)])
def test_the_rule_gives_the_published_bins(size_class: int, count: int) -> None:
    """Where diffusers has 33, the others are those of its 40 at 2048, scaled."""
    bins, table = aspect_bins(size_class), upstream_table(size_class)
    published = {Size(int(h), int(w)) for h, w in table.values()}
    assert len(published) == count
    assert published <= set(bins)
    whole = {Size(int(h) * size_class // 2048, int(w) * size_class // 2048) for h, w in upstream_table(2048).values()}
    assert set(bins) == whole
    assert len(bins) == 40
    for key, (h, w) in table.items():
        assert float(key) == pytest.approx(h / w, abs=0.011)


def test_the_4k_class_of_the_paper() -> None:
    """Sides of PixArt-Σ's 2880 class, as published: height to the widths it goes with."""
    published = {
        1408: (5184, 5376, 5568, 5760), 1600: (4672, 4800, 4992), 1792: (4288, 4480), 1920: (3776, 3904, 4096),
        2112: (3584, 3840), 2304: (3200, 3392), 2496: (3008, 3200), 2688: (2880, 3008), 2880: (2688, 2880),
        3008: (2496, 2688), 3200: (2304, 2496), 3392: (2304,), 3584: (2112,), 3840: (2112,), 3904: (1920,), 4096: (1920,),
        4288: (1792,), 4480: (1792,), 4672: (1600,), 4800: (1600,), 4992: (1600,), 5184: (1408,), 5376: (1408,),
        5568: (1408,), 5760: (1408,),
    }  # fmt: skip
    assert aspect_bins(2880) == tuple(Size(h, w) for h, widths in published.items() for w in widths)


@pytest.mark.parametrize("size_class", SIZE_CLASSES)
def test_bins_are_multiples_of_16_px_of_about_one_area(size_class: int) -> None:
    bins = aspect_bins(size_class)
    assert all(b.height % 16 == 0 and b.width % 16 == 0 for b in bins)
    assert all(0.86 <= b.area / size_class**2 <= 1 for b in bins)
    assert Size(size_class, size_class) in bins
    with pytest.raises(ValueError, match="no bins for the size class 360"):
        aspect_bins(360)


def test_the_nearest_bin_is_nearest_on_a_log_scale() -> None:
    """On a linear scale 1.57 would go to 1.67; of the ratios it is as far from 1.46, and 0.637 from 0.68 and 0.60."""
    bins = aspect_bins(1024)
    for h, w in ((1000, 700), (3000, 1100), (1570, 1000), (2290, 1000)):
        tall, wide = nearest_bin(Size(h, w), bins), nearest_bin(Size(w, h), bins)
        gaps = [abs(math.log(b.height / b.width * w / h)) for b in bins]
        assert abs(math.log(tall.height / tall.width * w / h)) == min(gaps)
        assert abs(math.log(wide.height / wide.width * h / w)) <= min(gaps) + 0.03  # 1.91 has no twin at 0.52


def test_families_without_a_table_keep_their_bins() -> None:
    for facts in FAMILIES.values():
        if facts.network == "unet":
            assert bins_for(facts, facts.native_px, 32) == make_bins(facts.native_px, 64)
        else:
            assert bins_for(facts, facts.native_px, 16) == aspect_bins(facts.native_px)
    assert bins_for(FAMILIES["cosxl"], 256, 32) == make_bins(256, 32)


def canvas_of(facts: FamilyFacts) -> tuple[int, int, tuple[Size, ...]]:
    """Native size, alignment and bins of a family at full size, from the configs that ship."""
    if facts.network == "pixart":
        return facts.native_px, 16, bins_for(facts, facts.native_px, 16)
    config = json.loads(shipped_config(facts.configs, "unet").read_text())
    align_px = align_of(unet_shape(config, facts), 8)
    return facts.native_px, align_px, bins_for(facts, facts.native_px, align_px)


CANVASES = {canvas_of(facts): facts.name for facts in FAMILIES.values()}  # families that share a canvas are swept once
EXTREMES = [
    (16, 16),
    (16, 800),
    (800, 16),
    (16, 9000),
    (9000, 180),
    (180, 9000),
    (720, 392),
    (392, 720),
    (8192, 8192),
    (4320, 7680),
]


@pytest.mark.parametrize("canvas", CANVASES, ids=CANVASES.values())
def test_law_6_thousands_of_sizes_come_out_of_every_familys_bins(canvas: tuple[int, int, tuple[Size, ...]]) -> None:
    """Every size goes through snapping, bins, stages and relays, and its own canvas holds it with less than a step to cut."""
    native_px, align_px, bins = canvas
    rng = random.Random(native_px)
    sizes = EXTREMES + [(rng.randint(16, 9000), rng.randint(16, 9000)) for _ in range(examples(4_000, 20_000) - len(EXTREMES))]
    for h, w in sizes:
        whole = snap(Size(h, w), align_px)
        stages = stage_canvases(whole, bins, align_px)
        assert stages[-1] == whole
        assert 0 <= whole.height - h < align_px
        assert 0 <= whole.width - w < align_px
        assert stages[0] in (whole, base_canvas(whole, bins, align_px))
        for before, after in itertools.pairwise(stages):
            resized, kept = relay_view(before, after)
            assert kept.top >= 0 and kept.left >= 0 and kept.bottom <= resized.height and kept.right <= resized.width
        assert all(s.height % align_px == 0 and s.width % align_px == 0 for s in stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_law_6_plans_of_every_family_deliver_the_size_asked_for(family: str, checkpoint: Callable[..., Checkpoint]) -> None:
    made, rng = checkpoint(family), random.Random(1)
    spec, card = load_spec(str(made.path), family=family, parts=made.parts), described_card(24 * 10**9)
    for h, w in EXTREMES[:8] + [(rng.randint(16, 5000), rng.randint(16, 5000)) for _ in range(examples(4, 12))]:
        plan = planner.plan(RenderRequest(prompt="", size=Size(h, w)), spec, card)
        assert plan.output == Size(h, w)
        assert plan.canvas == plan.stages[-1].canvas == plan.latent_grid.canvas.times(spec.cell_px)
        assert plan.canvas.height >= h and plan.canvas.width >= w
        assert any("base picture" in note for note in plan.notes)


def test_a_relay_says_what_is_rendered_and_how_far_it_is_enlarged() -> None:
    bins = aspect_bins(1024)
    for size, words in (
        (Size(4096, 4096), "base picture 1024x1024 (bin 1.00), enlarged 4.00x to the canvas 4096x4096, refined in 2 stages"),
        (Size(3520, 5266), "base picture 1216x832 (bin 0.68), enlarged 4.23x in height and 4.34x in width"),
        (Size(1024, 960), "base picture 960x1024 is the canvas itself; nothing is enlarged"),
        (Size(640, 16000), "base picture 5200x208 (narrower than any bin"),
    ):
        assert relay_note(stage_canvases(snap(size, 16), bins, 16), bins).startswith(words)
