"""Suites of rows: resumed, one change at a time, exponents of known laws, recipes against plain ones, limits that can fail."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.common import EQUAL_DB
from benchmarks.peers import Way
from benchmarks.peers.upscalers import LEAST, Metered, blended, halving, ours
from benchmarks.rows import STATE, AbsentError, Suite, carried_out, child, newest
from benchmarks.suites import demo, peers, scaling, waterfall
from hires.tiling.network import Tiling

SUITE = Suite(name="toy", key=("part", "side"), columns=("seconds", "psnr_db"), code=("rows",))
CASES = [{"part": part, "side": side} for part in ("a", "b") for side in ("64", "96")]


def measured_by(calls: list[Mapping[str, str]]) -> Any:
    def in_child(suite: Suite, case: Mapping[str, str], threads: int) -> Mapping[str, Any]:
        calls.append(case)
        return {STATE: "out of memory"} if case["side"] == "96" else {"seconds": len(calls), "psnr_db": 40.0}

    return in_child


def never(case: Mapping[str, str]) -> dict[str, Any]:
    raise AssertionError(f"{case} is measured in a process of its own")


def test_without_a_file_only_the_first_row_has_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Mapping[str, str]] = []
    monkeypatch.setattr(rows, "in_child", measured_by(calls))

    def here(case: Mapping[str, str]) -> dict[str, Any]:
        if case["side"] == "96":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"seconds": 9.0}

    found = carried_out(SUITE, CASES, None, torch.get_num_threads(), here)
    assert calls == CASES[:1]
    assert [(row[STATE], row["seconds"]) for row in found] == [
        ("ran", 1), ("out of memory", ""), ("ran", 9.0), ("out of memory", ""),
    ]  # fmt: skip


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two rows, a suite goes on with the third; other code or another thread count is another row."""
    calls: list[Mapping[str, str]] = []
    monkeypatch.setattr(rows, "in_child", measured_by(calls))
    csv = tmp_path / "toy.csv"
    carried_out(SUITE, CASES[:2], csv, 1, never)
    found = carried_out(SUITE, CASES, csv, 1, never)
    assert [call["part"] for call in calls] == ["a", "a", "b", "b"] and calls[:2] == CASES[:2]
    assert [row[STATE] for row in found] == ["ran", "out of memory"] * 2
    assert found[0]["seconds"] == "1" and found[1]["seconds"] == "" and found[2]["seconds"] == 3
    carried_out(SUITE, CASES[:1], csv, 2, never)
    assert len(calls) == 5
    elsewhere = {"commit": "0", "machine": "another", "torch": "2", "date": "2026-01-01"}
    monkeypatch.setattr(rows, "stamp", lambda: elsewhere)
    carried_out(SUITE, CASES[:1], csv, 2, never)
    assert len(calls) == 6, "another machine's rows are its own"
    monkeypatch.setattr(Suite, "settings", lambda self: "other code")
    carried_out(SUITE, CASES[:1], csv, 1, never)
    assert len(calls) == 7
    assert [row["settings"] == "other code" for row in newest(rows.read_rows(csv), SUITE.key)] == [True, False, False, False]


def test_what_a_process_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "bound_memory", lambda: None)

    def said(error: Exception | None) -> Any:
        def measure(case: Mapping[str, str]) -> dict[str, Any]:
            if error is not None:
                raise error
            return dict(case)

        assert child('{"part": "a"}', measure) == 0
        return json.loads(capsys.readouterr().out)

    assert said(None) == {"part": "a"}
    assert said(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) == {STATE: "out of memory"}
    assert said(AbsentError("no data")) == {STATE: "skipped: no data"}
    with pytest.raises(ZeroDivisionError):
        said(ZeroDivisionError())


def test_a_row_that_needs_more_than_there_is_ends_alone() -> None:
    """The bound turns what the system would kill for into an error that is known as out of memory."""
    code = (
        "import torch; from benchmarks.rows import child\n"
        "child('{}', lambda case: {'sum': float(torch.ones(2**42, dtype=torch.uint8)[0])})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=rows.ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == {STATE: "out of memory"}


def test_out_of_time_and_errors_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = dataclasses.replace(SUITE, name="waterfall", limit_s=0.01)
    assert rows.in_child(suite, {"part": "a"}, 1) == {STATE: "over 0.01 s"}
    ended = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    assert rows.in_child(suite, {"part": "a"}, 1) == {STATE: "out of memory"}
    ended.returncode, ended.stderr = 1, "Traceback: boom"
    with pytest.raises(RuntimeError, match="boom"):
        rows.in_child(suite, {"part": "a"}, 1)


def test_every_step_of_the_waterfall_is_one_change() -> None:
    """From naive to ours; the second, from the whole canvas to windows, brings its overlap and weights along. After ours comes
    what has to be asked for."""
    *steps, asked = waterfall.steps()
    assert len({step.name for step in steps}) == len(steps) and steps[-1] == waterfall.OURS
    assert asked == dataclasses.replace(waterfall.OURS, name=asked.name, dtype="bf16", asked=True)
    changes = [
        {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)} - {"name", "same"}
        for a, b in itertools.pairwise(steps)
    ]
    assert changes[:2] == [{"strategy", "overlap_px", "blend"}, {"strategy", "blend"}]
    assert all(len(change) == 1 for change in changes[2:])
    assert [step.same for step in steps] == sorted(step.same for step in steps)


def test_without_channels_last_maps_are_planes() -> None:
    x = torch.randn(1, 4, 5, 6)
    with waterfall.layout(False):
        assert x.contiguous(memory_format=torch.channels_last).is_contiguous()
    with waterfall.layout(True):
        assert not x.contiguous(memory_format=torch.channels_last).is_contiguous()


def waterfall_row(step: str, seconds: float, **more: Any) -> dict[str, Any]:
    plain = dict.fromkeys(waterfall.SUITE.columns, 1.0)
    return {"side": "2048", "step": step, STATE: "ran"} | plain | {"seconds": seconds, "psnr_to_ours_db": 90.0} | more


def test_the_waterfalls_table_and_limits() -> None:
    *names, asked = (step.name for step in waterfall.steps())
    table = [
        waterfall_row(names[-1], 10.0, psnr_to_ours_db=EQUAL_DB),
        waterfall_row(names[2], 40.0),
        waterfall_row(names[0], 0.0, state="over 600 s"),
        waterfall_row(names[1], 80.0, psnr_to_ours_db=12.0),
    ]
    lines = waterfall.table(table).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [*names[:3], names[-1]]
    assert "over 600 s" in lines[0]
    gains = [["> 7.50×", "> 7.50×"], ["2.00×", "> 15.00×"], ["4.00×", "> 60.00×"]]
    assert [line.split(" | ")[2:4] for line in lines[1:]] == gains
    assert all(waterfall.kept(table).values()) and lines[-1].endswith("equal |")
    slower = [waterfall_row(names[-1], 100.0), waterfall_row(names[4], 80.0, psnr_to_ours_db=30.0)]
    assert list(waterfall.kept(slower).values()) == [False, False, True]
    assert list(waterfall.kept(slower, timed=False).values()) == [False, True]
    quicker = [waterfall_row(names[-1], 10.0), waterfall_row(asked, 5.0, psnr_to_ours_db=52.0)]
    assert all(waterfall.kept(quicker).values()) and len(waterfall.kept(quicker)) == 3


def demo_row(version: str, seconds: float, options: str = "", psnr_db: float = 60.0) -> dict[str, Any]:
    known = {"against": "then", "side": "256", STATE: "ran"}
    return known | {"version": version, "seconds": seconds, "options": options, "psnr_to_ours_db": psnr_db}


def test_a_demo_slower_than_before_or_another_picture_in_bf16_is_said() -> None:
    ours = demo.OURS
    fine = [
        demo_row(ours, 50.0, psnr_db=999.0), demo_row(ours, 40.0, "--dtype bf16"), demo_row("then", 80.0, psnr_db=20.0),
        demo_row(ours, 60.0, psnr_db=999.0), demo_row(ours, 44.0, "--dtype bf16"), demo_row("then", 120.0, psnr_db=20.0),
    ]  # fmt: skip
    assert demo.kept(fine) == {"55% of the seconds of then": True, "--dtype bf16: PSNR >= 50 dB": True}
    assert demo.table(fine).splitlines()[2:] == [
        "| then | this tree | 55.0 | 50.0 to 60.0 | 55% | equal |",
        "| then | this tree --dtype bf16 | 42.0 | 40.0 to 44.0 | 42% | 60.0 dB |",
        "| then | then | 100.0 | 80.0 to 120.0 | 100% | 20.0 dB |",
    ]
    worse = [demo_row(ours, 90.0), demo_row(ours, 40.0, "--dtype bf16", 45.0), demo_row("then", 80.0)]
    assert not any(demo.kept(worse).values())


def test_versions_take_turns_and_their_pictures_are_held_against_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bf16 only where the CPU multiplies it; the other version's picture here is one grey level above ours."""
    monkeypatch.setattr(demo, "multiplies_bf16", lambda: False)
    wanted = demo.cases(64, "then", 2, tmp_path)
    assert [(case["round"], case["version"]) for case in wanted] == [(n, v) for n in "12" for v in ("this tree", "then")]

    def drawn(tree: Path, options: list[str], side: int, picture: Path) -> float:
        Image.new("RGB", (side, side), (7, 7, 7) if tree == demo.ROOT else (8, 8, 8)).save(picture)
        return 3.25

    monkeypatch.setattr(demo, "seconds", drawn)
    monkeypatch.setattr(demo, "unpacked", lambda commit, folder: folder / commit)
    found = [demo.measured(case) for case in wanted[:2]]
    assert found == [{"seconds": 3.2, "psnr_to_ours_db": 999.0}, {"seconds": 3.2, "psnr_to_ours_db": 48.1}]


def test_the_demo_that_is_timed_is_that_of_the_makefile() -> None:
    made = (demo.ROOT / "Makefile").read_text()
    assert f'render "{demo.CAPTION}" --size $(SIZE)' in made and "SIZE ?= 2048x2048" in made


def test_a_version_that_is_not_here_names_itself(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(["--against", "no-such-commit", "--csv", str(tmp_path / "demo.csv")])
    assert ended.value.code == 2 and "no-such-commit" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match=r"(?s)exit code 2\n.*--nonsense"):
        demo.seconds(demo.ROOT, ("--nonsense",), 256, tmp_path / "a.png")


@given(power=st.floats(0.1, 2.5), scale=st.floats(1e-3, 1e3))
def test_exponents_of_known_laws(power: float, scale: float) -> None:
    pixels = [1e6, 4e6, 16e6, 64e6]
    assert scaling.exponent(pixels, [scale * p**power for p in pixels]) == pytest.approx(power, abs=1e-9)


def scaling_row(part: str, side: int, seconds: float, attention: float, peak: float) -> dict[str, Any]:
    values = {"p50_s": seconds, "attention_s": attention, "peak_mib": peak, "process_mib": 300 + peak}
    return {"part": part, "side": side, STATE: "ran"} | values


def test_attention_is_fitted_apart_and_limits_can_fail() -> None:
    """Linear work with quadratic attention: linear without it. A part that grows faster breaks its limit."""
    part = "sdxl/4, bands"
    found = [scaling_row(part, s, (s / 1024) ** 2 + (s / 1024) ** 4, (s / 1024) ** 4, s * s / 1e4) for s in (512, 1024, 2048)]
    fit = scaling.fits(found)[part]
    assert fit["seconds_without_attention"] == pytest.approx(1) and fit["peak"] == pytest.approx(1) and fit["seconds"] > 1.2
    assert fit["attention_share"] == [0.2, 0.5, 0.8]
    assert all(scaling.kept(found).values())
    worse = [scaling_row("denoise", s, s**2.4, 0, s**2.2) for s in (512, 1024)]
    worse += [scaling_row("host", s, s**2, 0, s**2 / 1e3) for s in (512, 1024)]
    assert not any(scaling.kept(worse).values()) and len(scaling.kept(worse)) == 3
    lost = [*found, {"part": part, "side": 4096, STATE: "out of memory"}]
    assert scaling.fits(lost)[part]["sides"] == [512, 1024, 2048]
    assert "out of memory" in scaling.table(lost)
    assert list(scaling.kept(lost[2:]).values()) == [False], "one size tells nothing"


def test_the_clock_of_attention_sees_every_call() -> None:
    from hires.tiling.vae import TiledVAE

    vae = scaling.narrow_vae()
    z = torch.randn(1, 4, 8, 8)
    with scaling.attention_clock() as spent:
        TiledVAE(vae, policy="bands").decode(z)
    assert len(spent) >= 1 and min(spent) > 0
    before = len(spent)
    TiledVAE(vae, policy="bands").decode(z)
    assert len(spent) == before


class Doubling(nn.Module):
    """A 3 x 3 network of receptive radius 1, enlarged by two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(self.conv(x), 2)


@pytest.mark.parametrize("shape", [(70, 47), (64, 64), (33, 90)])
def test_halving_draws_the_whole_where_the_overlap_is_enough(shape: tuple[int, int]) -> None:
    network = Doubling()
    picture = torch.rand(3, *shape)
    whole = network(picture[None])[0]
    metered = Metered(network, room=54**2)
    assert torch.allclose(halving(picture, metered, 2), whole, atol=1e-5) and metered.refused >= 1
    assert torch.allclose(blended(picture, network, 2, 40), whole, atol=1e-5)
    tiling = Tiling(rows=shape[0], cols=shape[1], halo=1)
    assert torch.allclose(ours(picture, Metered(network, room=40**2), 2, tiling), whole, atol=1e-5)
    with pytest.raises(MemoryError, match=str(LEAST)):
        halving(picture, Metered(network, room=16), 2)


def test_results_are_held_against_the_first_way(tmp_path: Path) -> None:
    case = {"part": "vae", "side": "64", "pictures": str(tmp_path)}
    first = torch.rand(3, 64, 64)
    way = Way(run=lambda: first, like="a")
    assert peers.compared(way, "a", first, case) == {"like": "a"}
    other = first.clone()
    other[:, 32:] += 0.1
    found = peers.compared(dataclasses.replace(way, rows=(32,)), "b", other, case)
    span = float(first.max() - first.min())
    assert found["max_abs"] == pytest.approx(0.1 / span, rel=1e-2)
    assert found["psnr_db"] == pytest.approx(-20 * np.log10(0.1 / span / np.sqrt(2)), abs=0.1)
    assert found["seam_score"] > 1.5
    assert peers.compared(way, "c", first, case)["psnr_db"] == EQUAL_DB
    assert "psnr_db" not in peers.compared(way, "c", first, case | {"side": "96"}), "its reference had no room"


def peers_row(part: str, way: str, psnr: float | str, state: str = "ran") -> dict[str, Any]:
    plain = dict.fromkeys(peers.SUITE.columns, "") | {"p50_s": 1.5, "version": "diffusers 1", "psnr_db": psnr}
    return {"part": part, "side": "512", "way": way, STATE: state} | plain


def test_the_peers_table_and_limits() -> None:
    found = [
        peers_row("vae", "hires, bands", ""),
        peers_row("vae", "diffusers, whole", 130.0),
        peers_row("vae", "diffusers enable_tiling", 25.0),
        peers_row("attention", "hires, npa", 20.0),
        peers_row("vae", "hires, least memory", "", "out of memory"),
    ]
    assert peers.kept(found) == {
        "vae 512 diffusers, whole: PSNR >= 90 dB": True,
        "vae 512 hires, least memory: ran": False,
    }
    text = peers.table(found)
    assert "*vae*" in text and "*attention*" in text and "out of memory" in text and "25.0" in text
    assert list(peers.kept([peers_row("vae", "diffusers, whole", 60.0)]).values()) == [False]
    assert list(peers.kept([peers_row("SDXL pipeline", "hires.attach", 60.0)]).values()) == [False]


def test_every_part_of_the_peers_has_ways_and_sizes() -> None:
    known = peers.parts()
    wanted = list(peers.cases(list(known), [], True, Path("x")))
    assert {case["part"] for case in wanted} == {name for name, part in known.items() if part.quick}
    full = list(peers.cases(["vae"], [1024], False, Path("x")))
    assert [(case["side"], case["quick"]) for case in full] == [("1024", "")] * len(known["vae"].ways)


@pytest.mark.parametrize("suite", ["waterfall", "scaling", "peers"])
def test_what_options_refuse(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = {"waterfall": waterfall, "scaling": scaling, "peers": peers}[suite]
    options = {"waterfall": ["--only", "nothing"], "scaling": ["--parts", "nothing"], "peers": ["--parts", "nothing"]}[suite]
    with pytest.raises(SystemExit) as caught:
        module.main(options)
    assert caught.value.code == 2 and "nothing" in capsys.readouterr().err
