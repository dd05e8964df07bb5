"""`hires measure`: everything at once, bounded in memory, from a file with or without a plan; bad input is refused."""

from __future__ import annotations

import json
import math
import os
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

import hires
from hires.cli.app import app
from hires.errors import RequestError
from hires.images.boxes import ArraySource, LanczosSource, luma
from hires.images.formats import read_text
from hires.metrics.fidelity import drift, psnr
from hires.metrics.measure import consistency, measure, tile_drift, view_of
from hires.metrics.measure_file import parse_grid, planned
from hires.metrics.measures import lines, rows_of
from hires.metrics.report_picture import report, tone_shares
from hires.tiling.geometry import Box, Size, make_grid
from tests.support.pictures import coded, textured

DATA = Path(os.environ.get("HIRES_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def colour(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return coded(np.stack([textured(height, width, 3 * seed + channel) for channel in range(3)], axis=-1))


def whole(base: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    return LanczosSource(base, size).read(Box(0, 0, size.height, size.width))


def run(*args: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["measure", *args])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def saved(path: Path, pixels: NDArray[np.uint8], plan: object = None) -> str:
    info = PngImagePlugin.PngInfo()
    if plan is not None:
        info.add_itxt("hires:plan", plan if isinstance(plan, str) else json.dumps(plan, default=str))
    Image.fromarray(pixels).save(path, pnginfo=info)
    return str(path)


def test_an_enlargement_of_its_base_is_consistent_and_adds_nothing() -> None:
    base, size = colour(120, 160), Size(480, 640)
    found = measure(ArraySource(whole(base, size)), base, grid=make_grid(size, Size(160, 160), 40))
    assert found.detail is not None and found.consistency is not None
    assert found.tiles is not None and found.tiles.drift is not None and found.duplicates is not None
    assert found.detail.cutoff == 0.125
    assert found.detail.share < 0.02
    assert found.detail.over_lanczos == pytest.approx(1, abs=1e-6)
    assert found.consistency.psnr_db > 30
    assert found.consistency.delta_e < 3
    assert found.tiles.seams.score < 1.25
    assert found.tiles.drift.max_delta_e < 0.5
    assert len(found.duplicates.copies) == 0


def test_consistency_is_that_of_the_arrays() -> None:
    """Base rows in several bands; the picture's means over 3 x 4 pixels."""
    base = colour(150, 110)
    large = np.clip(base.repeat(3, 0).repeat(4, 1) + np.random.default_rng(0).integers(-9, 10, (450, 440, 3)), 0, 255).astype(
        np.uint8
    )
    small = large.reshape(150, 3, 110, 4, 3).mean((1, 3))
    found = consistency(ArraySource(large), base)
    assert found.psnr_db == pytest.approx(psnr(small, base, 255.0), abs=1e-3)
    assert found.drift == pytest.approx(drift(luma((small / 255).astype(np.float32)), luma(base)), rel=1e-3)
    same = consistency(ArraySource(base), base)
    assert same.psnr_db > 120 and same.delta_e < 1e-3


def test_a_tile_of_another_tone_is_named() -> None:
    base, size = colour(100, 150), Size(400, 600)
    large = whole(base, size).astype(np.int16)
    grid = make_grid(size, Size(200, 200), 0)
    large[200:, 200:400] += 12
    found = tile_drift(ArraySource(np.clip(large, 0, 255).astype(np.uint8)), base, grid)
    assert found.worst == (1, 1)
    assert found.max_delta_e > 2 > found.mean_delta_e
    assert found.std_luma == pytest.approx(12 / 255 * math.sqrt(5) / 6, rel=0.1)


@pytest.mark.parametrize(
    ("base", "size", "box"),
    [
        (Size(64, 64), Size(256, 256), Box(0, 0, 64, 64)),
        (Size(64, 66), Size(256, 256), Box(0, 0, 64, 66)),
        (Size(64, 80), Size(256, 256), Box(0, 8, 64, 64)),
        (Size(80, 64), Size(256, 256), Box(8, 0, 64, 64)),
    ],
)
def test_the_part_of_a_base_that_is_seen(base: Size, size: Size, box: Box) -> None:
    assert view_of(base, size) == box


@pytest.mark.parametrize("base", [Size(300, 200), Size(64, 128)])
def test_a_base_that_is_none(base: Size) -> None:
    with pytest.raises(RequestError, match=str(base)):
        view_of(base, Size(256, 256))


@pytest.mark.slow
@pytest.mark.parametrize("height", [512, 4096])
def test_memory_is_that_of_bands_not_of_the_picture(height: int) -> None:
    """4096 wide, 48 MiB as uint8 at 4096 rows: what is allocated beyond that, and how little more for twice the height."""
    pattern, base = colour(256, 1024), colour(height // 16, 256)
    peaks = []
    for rows in (height // 2, height):
        source, size = ArraySource(np.tile(pattern, (rows // 256, 4, 1))), Size(rows, 4096)
        tracemalloc.start()
        measure(source, base[: rows // 16], grid=make_grid(size, Size(512, 512), 128))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(f"peaks {[round(peak / 2**20, 1) for peak in peaks]} MiB")
    assert peaks[1] < 32 * 2**20
    assert peaks[1] - peaks[0] < 4 * 2**20


def test_the_plan_in_a_png_is_its_grid_and_its_base(tmp_path: Path) -> None:
    """A canvas of 1536 rows of which 1500 are delivered: tiles reach beyond the picture, and the base is seen in part."""
    plan = hires.plan(size="2048x1500", vram="8GB", device="cpu")
    assert (plan.canvas, plan.output) == (Size(1536, 2048), Size(1500, 2048))
    file = saved(tmp_path / "a.png", np.zeros((1500, 2048, 3), np.uint8), plan.to_json())
    text = read_text(Path(file))["hires:plan"]
    found, notes = planned(text, Size(1500, 2048))
    assert found is not None and notes == ()
    assert found.cell_px == 8
    assert found.grid.tops == tuple(8 * top for top in plan.latent_grid.tops)
    assert found.grid.tile == plan.latent_grid.tile.times(8)
    first = plan.stages[0].canvas
    assert found.base is not None and found.base.height in (first.height - 5, first.height - 4)
    other, notes = planned(text, Size(750, 1024))
    assert other is None and "2048x1500" in notes[0]


@pytest.mark.parametrize("rendered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_render_is_measured_on_its_own_tiles(tmp_path: Path, rendered: bool) -> None:
    if rendered:
        prompt = "a sun on the right over green mountains and a lake at dusk"
        hires.render(prompt, size="500x400", output=tmp_path / "a.png", seed=3, steps=3, device="cpu")
    else:
        saved(tmp_path / "a.png", colour(400, 500), hires.plan(size="500x400", device="cpu", steps=3).to_json())
    code, stdout, _ = run(str(tmp_path / "a.png"), "--json")
    document = json.loads(stdout)
    assert code == 0
    plan = hires.plan(size="500x400", device="cpu", steps=3)
    assert document["size"] == "500x400"
    assert document["tiles"]["grid"]["lefts"] == [8 * left for left in plan.latent_grid.lefts]
    assert document["tiles"]["cell_px"] == 8
    assert document["detail"]["over_lanczos"] > 1
    assert document["consistency"] is None
    assert 0 < document["tiles"]["seams"]["p_value"] <= 1


def test_a_damaged_plan_is_a_note(tmp_path: Path) -> None:
    for plan in ("{", "[]", '{"output": 3}', '{"output": {"height": 90, "width": 120}, "canvas": {"height": 0, "width": 0}}'):
        code, stdout, _ = run(saved(tmp_path / "a.png", colour(90, 120), plan))
        assert code == 0
        assert "note: its hires:plan cannot be read" in stdout


def test_the_table_names_marks_and_units(tmp_path: Path) -> None:
    pixels = np.full((200, 300, 3), 230, np.uint8)
    pixels[:100] = 18
    code, stdout, _ = run(saved(tmp_path / "a.png", pixels), "--grid", "128:32")
    assert code == 0
    assert "above 120:1, below 300:1; 8 bits can show at most 3295:1" in stdout
    assert "3 x 2 tiles of 128x128 px" in stdout
    assert "give `base` FILE" in stdout
    assert not re.search(r"\bnan\b", stdout)


def test_what_is_past_its_mark_is_told(tmp_path: Path) -> None:
    """Two copies of the subject, and a tile of another tone: values of their rows and the rows' alarms."""
    base, size = colour(128, 160) // 3 + 60, Size(512, 640)
    rows, cols = np.mgrid[:24, :24] - 11.5
    base[50:74, 60:84] += (90 * np.clip(9 - np.hypot(rows, cols), 0, 1)).astype(np.uint8)[..., None]
    large = whole(base, size).copy()
    large[:256, :320] += 14
    for top, left in ((350, 90), (420, 560)):
        large[top : top + 24, left : left + 24] = base[50:74, 60:84]
    found = measure(ArraySource(large), base, grid=make_grid(size, Size(256, 320), 0))
    told = {row.name.strip(): row for row in rows_of(found)}
    assert {name for name, row in told.items() if row.alarm} == {"duplicates", "seams", "tile drift"}
    assert told["duplicates"].value == "2"
    assert told["seams"].remark.startswith("seen")
    assert "(row 1, column 1), above 2" in told["tile drift"].remark
    assert all(len(row.value) <= 14 for row in told.values())


def test_the_report_is_a_picture(tmp_path: Path) -> None:
    base, size = colour(64, 96), Size(256, 384)
    file, small = saved(tmp_path / "a.png", whole(base, size)), saved(tmp_path / "base.png", base)
    target = tmp_path / "report.png"
    code, stdout, stderr = run(file, "--base", small, "--grid", "128:32", "--report", str(target), "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["detail"]["base"] == "96x64"
    with Image.open(target) as drawn:
        assert drawn.width == 1480 and drawn.height > 900
        seen = np.asarray(drawn.convert("RGB")).reshape(-1, 3)
    assert all((np.abs(seen.astype(int) - rgb).sum(1) < 6).sum() > 200 for rgb in ((18, 97, 166), (194, 65, 12)))


@pytest.mark.parametrize("size", [Size(16, 16), Size(17, 900), Size(700, 40)])
def test_odd_shapes_are_measured_and_drawn(size: Size) -> None:
    source = ArraySource(colour(size.height, size.width))
    found = measure(source, grid=make_grid(size, Size(12, 12), 4))
    assert report("odd", source, found).shape[1] == 1480
    assert all(math.isfinite(value) for value in tone_shares(found.contrast))
    assert len(lines("odd", found)) > len(rows_of(found))


def test_flat_pictures_are_measured_and_drawn() -> None:
    for value in (0, 128, 255):
        source = ArraySource(np.full((64, 80, 3), value, np.uint8))
        found = measure(source, np.full((32, 40, 3), value, np.uint8), grid=make_grid(Size(64, 80), Size(32, 32), 8))
        assert found.detail is not None and found.detail.over_lanczos is None
        assert found.tiles is not None and found.tiles.seams.score == 1
        json.dumps(found.to_json(), allow_nan=False)
        report("flat", source, replace(found, notes=("a note",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--grid", "1024"], "grid 1024: give TILE:OVERLAP"),
        (["--grid", "64:64"], "grid 64:64: the overlap must be below the tile"),
        (["--grid", "0:0"], "grid 0:0"),
        (["--grid", "40:34"], "grid 40:34: edges would lie under 8 px apart"),
        (["--grid", "512:64"], "grid 512:64: one tile holds all of 120x90"),
        (["--base", "LARGE"], "base of 240x180: is larger than the picture of 120x90"),
        (["--base", "TALL"], "base of 20x60: is of another shape"),
        (["--base", "TEXT"], "give a picture file"),
        (["--base", "absent.png"], "absent.png"),
        (["--report", "out.jpg"], "must end in .png"),
        (["--report", "no/such/out.png"], "does not exist"),
        (["--report", "FILE"], "give another name"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(options: list[str], words: str, tmp_path: Path) -> None:
    names = {
        "FILE": saved(tmp_path / "a.png", colour(90, 120)),
        "LARGE": saved(tmp_path / "large.png", colour(180, 240)),
        "TALL": saved(tmp_path / "tall.png", colour(60, 20)),
        "TEXT": str(tmp_path / "text.png"),
    }
    Path(names["TEXT"]).write_text("no picture")
    before = Path(names["FILE"]).read_bytes()
    code, stdout, stderr = run(names["FILE"], *(names.get(option, option) for option in options))
    assert (code, stdout) == (2, "")
    assert words in stderr and "Traceback" not in stderr
    assert Path(names["FILE"]).read_bytes() == before


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    tiny = saved(tmp_path / "tiny.png", np.zeros((5, 40, 3), np.uint8))
    for file, words in ((str(tmp_path / "text.png"), "give a picture file"), (tiny, "16 px"), (str(tmp_path), "picture")):
        code, stdout, stderr = run(file)
        assert (code, stdout) == (2, "")
        assert words in stderr and "Traceback" not in stderr


def test_the_planners_grid_is_what_the_option_means() -> None:
    assert parse_grid("1024:256", Size(4320, 7680)) == make_grid(Size(4320, 7680), Size(1024, 1024), 256)
    assert parse_grid("1024:0", Size(700, 3000)).tops == (0,)


@pytest.mark.parametrize(
    "name", ["kodim19.png", "kodim23.png", pytest.param("flower_BSD3_2268x1512.png", marks=pytest.mark.slow)]
)
def test_a_photograph_against_its_own_reduction(name: str) -> None:
    if not (DATA / "photos" / name).is_file():
        pytest.skip(f"{DATA / 'photos' / name} is absent")
    with Image.open(DATA / "photos" / name) as opened:
        picture = opened.convert("RGB")
    base = np.asarray(picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.BOX))
    found = measure(ArraySource(np.asarray(picture)), base)
    assert found.detail is not None and found.consistency is not None and found.duplicates is not None
    assert found.detail.over_lanczos is not None and found.detail.over_lanczos > 2
    assert found.detail.kept_by_median > 0.3
    assert found.consistency.psnr_db > 50
    assert len(found.duplicates.copies) == 0


def test_python_takes_a_path_a_pil_image_and_an_array(tmp_path: Path) -> None:
    pixels, plan = colour(272, 320), hires.plan(size="320x272", device="cpu", steps=3)
    file = saved(tmp_path / "a.png", pixels, plan.to_json())
    found = hires.measure(file)
    with Image.open(file) as opened:
        assert hires.measure(opened).to_json() == found.to_json()
    assert found.tiles is not None and found.tiles.grid.lefts == tuple(8 * left for left in plan.latent_grid.lefts)
    plain = hires.measure(pixels, grid="128:32")
    assert plain.contrast.ratio == found.contrast.ratio and plain.tiles is not None and plain.tiles.grid.tile == Size(128, 128)
    deep = hires.measure(pixels.astype(np.uint16) * 257)
    assert (deep.bits, plain.bits) == (16, 8) and deep.sharpness.laplacian == pytest.approx(plain.sharpness.laplacian)
    small = pixels.reshape(68, 4, 80, 4, 3).mean((1, 3)).round().astype(np.uint8)
    for base in (small, Image.fromarray(small)):
        against = hires.measure(pixels, base=base)
        assert against.consistency is not None and against.consistency.psnr_db > 50


def test_measures_are_printed_as_their_table(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.png", colour(90, 120))
    found = hires.measure(file, grid="64:16")
    assert run(file, "--grid", "64:16")[1] == found.explain(file) + "\n"
    assert repr(found) == str(found) == found.explain() and repr(found).startswith("the picture: 120x90, 8 bits per channel\n")
    for wrong, words in (
        (np.zeros((90, 120), np.uint8), "give"),
        (tmp_path / "absent.png", "absent"),
        (np.zeros((9, 9, 3)), "16 px"),
    ):
        with pytest.raises(RequestError, match=words):
            hires.measure(wrong)
