"""`hires bench`: rows that add up, a JSON document last, out of memory as a value, a CSV that grows, a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hires.bench.plots import line
from hires.bench.row import COLUMNS, SUITES, BenchSetup, Row
from hires.bench.suites import suite_of
from hires.bench.timing import Timed
from hires.cli.app import app
from hires.tiling.geometry import Size


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["bench", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_row_has_rates_and_its_share_of_the_floor() -> None:
    row = Row(
        suite="vae", case="decode", way="bands", size="1x1", taken=Timed(p20=0.5, p50=1.0, p80=2.0, repeats=3),
        flops=2e12, moved=4e9, peak_flops=4e12, peak_bandwidth=5e9, predicted_peak_bytes=2**21, measured_peak_bytes=2**20,
        measure="PSNR dB", quality=60.0,
    )  # fmt: skip
    found = row.to_json()
    assert (found["tflop_per_s"], found["gb_per_s"], found["share_of_peak"]) == (2.0, 4.0, 0.5)
    assert found["share_of_floor"] == 0.8, "0.5 s of FLOPs, 0.8 s of bytes: the larger is the floor"
    assert (found["predicted_peak_mib"], found["measured_peak_mib"]) == (2.0, 1.0)
    assert tuple(found) == COLUMNS and "1 MiB of 2 predicted, PSNR dB 60" in line(row)
    empty = Row(suite="a", case="b", way="c", size="d", taken=Timed(state="out of memory"))
    assert line(empty).endswith("out of memory") and empty.floor_seconds is None


@pytest.mark.parametrize(
    ("name", "size"),
    [("norm", "256x256"), *(pytest.param(name, None, marks=pytest.mark.slow) for name in ("norm", "attention", "vae", "io"))],
)
def test_quick_suites_measure_what_they_say(name: str, size: str | None, tmp_path: Path) -> None:
    table, picture = tmp_path / "rows.csv", tmp_path / "rows.svg"
    arguments = [name, "--quick", "--device", "cpu", "--csv", str(table), *(["--size", size] if size else [])]
    code, stdout, stderr = run(*arguments, "--plot", str(picture))
    assert code == 0, stderr
    document = json.loads(stdout.splitlines()[-1])
    assert document["device"] and document["torch"] == torch.__version__
    ran = [row for row in document["rows"] if row["state"] == "ran"]
    assert ran and all(
        row["suite"] == name and row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["repeats"] >= 2 for row in ran
    )
    assert all(row["state"].startswith(("refused: ", "skipped: ")) for row in document["rows"] if row["state"] != "ran")
    checked = [row for row in ran if row["quality"] is not None]
    assert checked
    for row in checked:
        if row["measure"] == "rms error":
            assert row["quality"] < 1e-6
        if row["measure"].startswith("PSNR dB to "):
            assert row["quality"] > 90
        if row["measure"] == "exact":
            assert row["quality"] == float(not any(lossy in row["case"] for lossy in (".jpg", ".webp")))
    with table.open() as opened:
        kept = list(csv.DictReader(opened))
    assert [row["way"] for row in kept] == [row["way"] for row in document["rows"]]
    assert run(*arguments)[0] == 0
    assert len(table.read_text().splitlines()) == 1 + 2 * len(kept)
    assert picture.read_text().count("<path") > 10
    assert len(stderr.splitlines()) == 1 + len(kept)


@pytest.mark.slow
def test_the_denoiser_is_the_same_in_any_batch() -> None:
    rows = list(suite_of("denoise")(BenchSetup(device=torch.device("cpu"), quick=True)))
    assert [row.way.split(",")[0] for row in rows] == ["tiles", "npa"]
    for row in rows:
        assert row.quality is not None and row.quality < 1e-5
        assert row.flops is not None and row.flops > 1e9 and row.predicted_peak_bytes is not None


@pytest.mark.slow
def test_a_render_and_an_enlargement() -> None:
    setting = BenchSetup(device=torch.device("cpu"), quick=True, sizes=(Size(320, 512),))
    (rendered,) = suite_of("render")(setting)
    assert rendered.size == "512x320" and rendered.measure == "seam score" and rendered.flops is not None
    assert rendered.quality is not None and 0 < rendered.quality < 1.5 and "progressive" in rendered.way
    ways = [row.way for row in suite_of("upscale")(BenchSetup(device=torch.device("cpu"), quick=True, sizes=(Size(40, 56),)))]
    assert ways == ["lanczos", "lanczos, refined"]


def test_out_of_memory_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("hires.bench.kernels.attention", full)
    monkeypatch.setattr("hires.bench.timing.free_memory", lambda: None)  # of a heap this large it takes a third of a second
    code, stdout, stderr = run("attention", "--quick", "--device", "cpu", "--size", "256x256")
    assert code == 0 and {row["state"] for row in json.loads(stdout)["rows"]} == {"out of memory"} and "out of memory" in stderr


def test_no_room_is_a_row_in_every_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    code, stdout, _ = run("render", "--quick", "--device", "cpu", "--vram", "100kB", "--size", "256x256", "--size", "64x64")
    rows = json.loads(stdout)["rows"]
    assert code == 0 and [row["size"] for row in rows] == ["256x256", "64x64"]
    assert all(row["state"].startswith("no room: ") and row["p50_ms"] is None for row in rows)

    def full(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch, "randn", full)
    code, stdout, _ = run("norm", "--quick", "--device", "cpu")
    assert code == 0 and [row["state"] for row in json.loads(stdout)["rows"]] == ["out of memory"]


def test_policies_above_the_budget_say_so() -> None:
    rows = list(suite_of("vae")(BenchSetup(device=torch.device("cpu"), vram="100kB", quick=True)))
    assert rows and all("the budget is" in row.taken.state for row in rows)


def test_wrong_options_end_with_2_and_a_next_move(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for arguments, reason in (
        (["vae", "--size", "8x8"], "at least"),
        (["vae", "--dtype", "fp8"], "fp32"),
        (["vae", "--vram", "much"], "24GB"),
        (["vae", "--model", "nobody"], "unknown model"),
        (["vae", "--plot", str(tmp_path / "a.gif")], ".svg"),
        (["vae", "--plot", str(tmp_path / "no" / "a.png")], "does not exist"),
        (["norm", "--csv", str(tmp_path / "other.csv")], "other columns"),
        (["vae", "--device", "cuda:7"], "cuda:7"),
    ):
        code, _, stderr = run(*arguments, "--quick")
        assert code == 2 and reason in stderr and "Traceback" not in stderr, (arguments, stderr)


def test_every_suite_has_a_command_with_help() -> None:
    for name in (*SUITES, "all", "calibrate"):
        code, stdout, _ = run(name, "--help")
        assert code == 0 and "--device" in stdout
