"""The suite of an engine that stays: errors of the time left, the same pictures in every way, limits that can fail."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hires
from benchmarks.report import tables
from benchmarks.rows import STATE
from benchmarks.suites import engine


def test_the_time_left_is_held_against_what_was_left() -> None:
    """Ten seconds from 100: what is told before a tenth and after 90 % does not count, what is unknown is wrong by all."""
    told = [(100.0, None), (100.5, 90.0), (101.0, 9.9), (104.0, 3.0), (108.0, 2.4), (109.5, 5.0)]
    assert engine.eta_errors(told, 110.0) == {"seconds": 10.0, "eta_at_tenth": 0.1, "eta_largest": 0.5}
    assert engine.eta_errors([(100.0, None), (102.0, None), (103.0, 7.0)], 110.0)["eta_at_tenth"] == 1.0
    late = engine.eta_errors([(100.0, 10.0), (109.5, 0.6)], 110.0)
    assert late["eta_at_tenth"] == late["eta_largest"] == 0.2


def test_loading_is_no_part_of_the_drawing() -> None:
    """The render of a real engine: loading is heard and left out, and the end comes after the file."""

    class Listening:
        def render(self, prompt: str, **options: Any) -> None:
            stages: list[str] = []

            def hear(event: hires.Event) -> None:
                stages.append(event.stage)
                options["on_event"](event)

            with hires.load() as real:
                real.render(prompt, **(options | {"size": (64, 96), "steps": 2, "on_event": hear}))
            self.stages = stages

    listening = Listening()
    moments, end = engine.heard(listening, 64)  # type: ignore[arg-type]
    assert listening.stages.count("load") == 2 and len(moments) == len(listening.stages) - 2
    assert {"base", "decode", "write"} <= set(listening.stages)
    assert [at for at, _ in moments] == sorted(at for at, _ in moments) and end > moments[-1][0]


@pytest.mark.parametrize(("way", "renders"), engine.RENDERS.items())
def test_a_second_render_is_of_the_same_engine(way: str, renders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, int]] = []

    def heard(loaded: hires.Engine, side: int) -> tuple[list[engine.Moment], float]:
        seen.append((loaded, side))
        return [(0.0, None), (1.0, 9.0 * len(seen))], 10.0

    monkeypatch.setattr(engine, "heard", heard)
    found = engine.measured(engine.as_case("eta", 96, 1, way, 1, Path()))
    assert len(seen) == renders and len({id(loaded) for loaded, _ in seen}) == 1 and {side for _, side in seen} == {96}
    assert found == {"seconds": 10.0, "eta_at_tenth": renders - 1.0, "eta_largest": renders - 1.0}


def drawn_by(grey: dict[str, int], calls: list[str]) -> Any:
    def way_of(way: str) -> Any:
        def draw(prompts: list[str], side: int, folder: Path) -> float:
            calls.append(way)
            for number in range(len(prompts)):
                Image.new("RGB", (side, side), (grey[way] + number,) * 3).save(folder / f"{number}.png")
            return 1.234

        return draw

    return {way: way_of(way) for way in engine.WAYS}


def test_pictures_of_all_ways_are_held_against_the_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """These are drawn where they are not here yet, and only then; here the commands' are three levels above."""
    calls: list[str] = []
    grey = {engine.ENGINE: 7, engine.MANY: 6, engine.PROCESSES: 10, engine.WHOLE: 7}
    monkeypatch.setattr(engine, "WAYS", drawn_by(grey, calls))
    found = {way: engine.measured(engine.as_case("many", 8, 3, way, 1, tmp_path)) for way in (engine.PROCESSES, *engine.WAYS)}
    assert calls == [engine.PROCESSES, engine.ENGINE, *engine.WAYS]
    assert {way: row["largest_difference_255"] for way, row in found.items()} == {
        engine.PROCESSES: 3, engine.ENGINE: 0, engine.MANY: 1, engine.WHOLE: 0,
    }  # fmt: skip
    assert found[engine.MANY]["seconds"] == 1.23


def test_every_way_draws_every_prompt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engines and the script of the whole process for real, here; the command as what it would be called with."""
    commands: list[tuple[str, ...]] = []

    def command(*arguments: str) -> tuple[float, str]:
        commands.append(arguments)
        monkeypatch.setattr(sys, "argv", ["-c", *arguments[2:]])
        if arguments[1] == engine.WHOLE_SCRIPT:
            exec(arguments[1], {})
        return 2.0, ""

    monkeypatch.setattr(engine, "command", command)
    prompts = engine.captions(2)
    folders = {way: tmp_path / way for way in engine.WAYS}
    for way, draw in engine.WAYS.items():
        folders[way].mkdir()
        assert draw(prompts, 64, folders[way]) > 0
    rendered, whole = commands[:2], commands[2]
    assert [arguments[2:7] for arguments in rendered] == [("render", prompt, "--size", "64x64", "-o") for prompt in prompts]
    assert [arguments[7] for arguments in rendered] == [str(folders[engine.PROCESSES] / f"{n}.png") for n in range(2)]
    assert whole[2:] == ("64x64", str(folders[engine.WHOLE]), *prompts)
    for number in range(2):
        ours = folders[engine.ENGINE] / f"{number}.png"
        assert all(engine.difference(folders[way] / ours.name, ours) <= 1 for way in (engine.MANY, engine.WHOLE))
    assert engine.difference(folders[engine.ENGINE] / "0.png", folders[engine.ENGINE] / "1.png") > 1


def test_a_start_beside_torch_and_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "a line before\n" + json.dumps({"stats": [{"seconds": 0.5}, {"seconds": 0.25}]})
    answers = {"import torch": (1.25, ""), engine.START: (4.25, said)}
    calls: list[str] = []

    def command(*arguments: str) -> tuple[float, str]:
        calls.append(arguments[1])
        assert (arguments[1] == engine.START) == ("--json" in arguments)
        return answers[arguments[1]]

    monkeypatch.setattr(engine, "command", command)
    found = engine.measured(engine.as_case("start", 64, 1, engine.PROCESSES, 1, Path()))
    assert found == {"seconds": 4.25, "import_torch_s": 1.25, "stages_s": 0.75, "over_stages": 4.0}
    assert calls == ["import torch", engine.START]


def test_a_command_is_of_this_tree_and_keeps_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    seconds, said = engine.command(
        "-c", "import os; print(os.environ.get('PYTHONDONTWRITEBYTECODE'), os.environ['PYTHONPATH'])"
    )
    assert seconds > 0 and said.split() == ["None", str(engine.ROOT)]
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*boom"):
        engine.command("-c", "raise SystemExit('boom')")


def test_no_calibration_within(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for before in (str(tmp_path), None):
        monkeypatch.setenv("XDG_CACHE_HOME", before) if before else monkeypatch.delenv("XDG_CACHE_HOME")
        with engine.never_calibrated():
            assert not any(Path(os.environ["XDG_CACHE_HOME"]).iterdir()) and os.environ["XDG_CACHE_HOME"] != before
        assert os.environ.get("XDG_CACHE_HOME") == before


def row(part: str, way: str, seconds: float, state: str = "ran", **more: Any) -> dict[str, Any]:
    plain = {"part": part, "side": "256", "prompts": "8", "way": way, "round": "1", STATE: state, "largest_difference_255": 0}
    return plain | dict.fromkeys(("eta_at_tenth", "eta_largest", "import_torch_s", "stages_s")) | {"seconds": seconds} | more


FINE = [
    row("eta", engine.FIRST, 10.0, eta_at_tenth=0.25, eta_largest=3.0),
    row("eta", engine.SECOND, 9.0, eta_at_tenth="0.1", eta_largest="0.2"),
    *(row("many", engine.PROCESSES, seconds) for seconds in (90.0, 100.0, 140.0)),
    row("many", engine.ENGINE, 20.0),
    row("many", engine.MANY, 18.0, largest_difference_255="1"),
    row("many", engine.WHOLE, 20.0, largest_difference_255=1),
    row("start", engine.PROCESSES, 4.0, import_torch_s=1.5, stages_s=0.5),
    row("start", engine.PROCESSES, 5.0, import_torch_s=1.0, stages_s=1.0),
    row("start", engine.PROCESSES, 9.0, import_torch_s=1.0, stages_s=2.0),
]  # fmt: skip


def test_limits_can_fail() -> None:
    assert all(engine.kept(FINE).values()) and len(engine.kept(FINE)) == 5
    worse = [
        row("eta", engine.FIRST, 10.0, eta_at_tenth=0.26, eta_largest=0.3),
        row("many", engine.PROCESSES, 90.0),
        row("many", engine.ENGINE, 20.0, "out of memory"),
        row("many", engine.ENGINE, 20.0, largest_difference_255=2),
        row("many", engine.MANY, 18.1),
    ]
    assert not any(engine.kept(worse).values()) and len(engine.kept(worse)) == 5
    assert list(engine.kept(worse, timed=False).values()) == [False, False]
    assert engine.kept(FINE[:1]) and engine.kept(FINE[-1:]) == {}


def test_a_start_that_takes_too_long_is_told_and_breaks_nothing() -> None:
    assert engine.wanted(FINE) == {
        "start: beside the import of torch 4.0 times its stages, 2 is wanted": False,
        "render_many with its start: 0.20 of the seconds of hires render, 0.2 is wanted": True,
    }
    assert list(engine.wanted([row("start", engine.PROCESSES, 3.0, import_torch_s=1.0, stages_s=1.0)]).values()) == [True]
    assert engine.wanted(FINE[:3]) == {}


def test_the_tables() -> None:
    """Ways in one order, medians; what did not run says so."""
    eta, many, start = (text.splitlines()[2:] for text in engine.table([*FINE]).split("\n\n"))
    assert eta == ["| 256², first render | 10.0 | 25% | 300% |", "| 256², second render | 9.0 | 10% | 20% |"]
    assert many == [
        "| `engine.render` | 20.0 | 20.0 to 20.0 | 0.20 | 1.00 | 0 |",
        "| `render_many` | 18.0 | 18.0 to 18.0 | 0.18 | 0.90 | 1 |",
        "| `hires render` | 100.0 | 90.0 to 140.0 | 1.00 | 5.00 | 0 |",
        "| `render_many with its start` | 20.0 | 20.0 to 20.0 | 0.20 | 1.00 | 1 |",
    ]
    assert start == ["| 5.00 | 1.00 | 1.00 | 4.0 | at most 2: not met |"]
    lost = [row(part, way, 0.0, "over 600 s") for part, way in (("eta", engine.FIRST), ("many", engine.MANY), ("start", "x"))]
    assert engine.table(lost).count("over 600 s") == 3
    widths = {line.count("|") for line in engine.many_table([*lost, *FINE]).splitlines()}
    assert len(widths) == 1


def test_tables_of_the_report_are_of_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "rows_of", lambda name: FINE[:2])
    assert tables.BLOCKS["engine-eta"]() == engine.eta_table(FINE[:2])
    with pytest.raises(FileNotFoundError, match="engine --parts start"):
        tables.BLOCKS["engine-start"]()


def test_ways_take_turns_and_each_size_is_rendered_first_and_second() -> None:
    every = engine.cases([96, 128], 2, Path("p"))
    many = [(case["round"], case["way"]) for case in every if case["part"] == "many"]
    assert many == [(turn, way) for turn in "12" for way in engine.WAYS] and next(iter(engine.WAYS)) == engine.ENGINE
    eta = [(case["side"], case["way"]) for case in every if case["part"] == "eta"]
    assert eta == [(side, way) for side in ("96", "128") for way in engine.RENDERS]
    assert [case["round"] for case in every if case["part"] == "start"] == ["1", "2"]
    assert {case["part"] for case in engine.quick_cases(Path("p"))} == set(engine.PARTS)


def test_the_command_line_counts_as_code(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path] = []
    monkeypatch.setattr(engine, "digest", lambda given: files.extend(given) or "0")
    assert engine.SUITE.settings() == "0"
    named = {str(file.relative_to(engine.ROOT)) for file in files}
    assert {"hires/cli/app.py", "hires/__init__.py", "hires/engine/resident.py", "benchmarks/suites/engine.py"} <= named


@pytest.mark.parametrize("options", [["--parts", "nothing"], ["--sides", "32"], ["--rounds", "0"], ["--sides", ""]])
def test_what_options_refuse(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        engine.main(options)
    assert ended.value.code == 2 and options[0] in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "code"), [(1, 0), (2, 1)])
def test_a_missed_start_leaves_the_exit_code(
    difference: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [FINE[-1], row("many", engine.ENGINE, 2.0, largest_difference_255=difference)]
    monkeypatch.setattr(engine, "carried_out", lambda *arguments: found)
    assert engine.main(["--quick"]) == code
    said = capsys.readouterr()
    document = json.loads(said.out.splitlines()[-1])
    assert list(document["wanted"].values()) == [False] and "not met: start" in said.err
