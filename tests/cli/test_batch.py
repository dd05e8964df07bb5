"""Several pictures of one `hires render`: their files, one loading, what stays after a stop, how the same command goes on."""

from __future__ import annotations

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

import hires
from hires.cli import batch
from hires.cli.app import app
from hires.cli.display import numbered
from hires.errors import Cancelled, RequestError, WriteError
from hires.events import Event
from hires.images.formats import read_text
from hires.pipelines import load as loading
from tests.support.forked import Command

SUN, MOON = "a sun on the right over green mountains and a lake at dusk", "a moon on the left over a lake at night"
SMALL = ("--size", "96x64", "--steps", "2")


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["render", *map(str, args)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def fresh(prompt: str, seed: int, **options: Any) -> np.ndarray[Any, Any]:
    return hires.render(prompt, size="96x64", steps=2, seed=seed, **options).pixels  # type: ignore[no-any-return]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a model and its text encoders were loaded, and prompts encoded."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> None:
        real: Callable[..., Any] = getattr(loading, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(loading, name, call)

    for name in ("load_family", "load_encoders", "encode"):
        counted(name)
    return counts


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """`failing(n, error)`: the n-th render raises in the middle of its base stage."""
    from hires.engine.resident import Engine

    real, done = Engine.carry_out, 0

    def arrange(which: int, error: BaseException) -> None:
        def carry_out(self: Engine, job: Any) -> Any:
            nonlocal done
            done += 1

            def stop(event: Event) -> None:
                if event.stage == "base" and event.step == 1:
                    raise error

            return real(self, replace(job, on_event=stop) if done == which else job)

        monkeypatch.setattr(Engine, "carry_out", carry_out)

    return arrange


def test_several_prompts_and_seeds_go_into_a_folder_with_one_loading(
    tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture is that of a process of its own, and its file tells its own prompt and seed."""
    monkeypatch.setattr("hires.engine.loaded.HOST_SHARE", 0.0)  # text encoders do not stay: all prompts are encoded at once
    code, stdout, stderr = run(SUN, MOON, "--count", 2, "--seed", 5, *SMALL, "-o", tmp_path / "out")
    assert code == 0, stderr
    assert calls == {"load_family": 1, "load_encoders": 1, "encode": 2}
    files = {(SUN, 5): "a-sun-on-the-right-over-green-mountains-and-a-lake-at-dusk-5.png"}
    files |= {(MOON, 6): "a-moon-on-the-left-over-a-lake-at-night-6.png"}
    assert len(names(tmp_path / "out")) == 4
    for (prompt, seed), name in files.items():
        with Image.open(tmp_path / "out" / name) as opened:
            assert np.array_equal(np.asarray(opened), fresh(prompt, seed))
        text = read_text(tmp_path / "out" / name)
        assert (text["prompt"], text["seed"]) == (prompt, str(seed))
    assert [f"{number}/4 base: step 2/2" in stderr for number in (1, 2, 3, 4, 5)] == [True] * 4 + [False]
    assert stdout.splitlines()[-1] == "4 of 4 rendered, 0 skipped, 0 failed"
    assert len(re.findall(r"\.png: 96x64, ", stdout)) == 4


def test_a_name_gets_numbers(tmp_path: Path) -> None:
    code, stdout, _ = run(SUN, MOON, *SMALL, "-o", tmp_path / "a.tif", "--json")
    document = json.loads(stdout)
    assert (code, document.keys()) == (0, {"done", "skipped", "failed"})
    assert names(tmp_path) == ["a-1.tif", "a-2.tif"]
    assert [done["path"] for done in document["done"]] == [str(tmp_path / name) for name in names(tmp_path)]
    assert [read_text(tmp_path / name)["prompt"] for name in names(tmp_path)] == [SUN, MOON]


def test_one_prompt_is_as_before_and_a_count_of_one_is_one_of_several(tmp_path: Path) -> None:
    code, stdout, stderr = run(SUN, *SMALL, "-o", tmp_path / "a.png", "--json")
    assert (code, json.loads(stdout)["path"], names(tmp_path)) == (0, str(tmp_path / "a.png"), ["a.png"])
    assert "base: step 2/2" in stderr and "1/1 base" not in stderr
    assert "hires:request" not in read_text(tmp_path / "a.png")
    for wrong, words in (
        (["-o", tmp_path], "must end in .png"),
        (["-o", tmp_path / "b.png", "--suffix", ".tif"], "--suffix .tif"),
    ):
        code, _, stderr = run(SUN, *SMALL, *wrong)
        assert (code, words in stderr) == (2, True)
    code, stdout, _ = run(SUN, *SMALL, "--count", 1, "-o", tmp_path / "b.png", "--json")
    assert (code, len(json.loads(stdout)["done"]), names(tmp_path)) == (0, 1, ["a.png", "b-1.png"])


@pytest.mark.parametrize("suffix", [".png", ".tif", *(pytest.param(end, marks=pytest.mark.slow) for end in (".jpg", ".webp"))])
def test_what_is_finished_is_skipped_and_told_in_every_format(suffix: str, tmp_path: Path) -> None:
    command = ("a sun", "--count", 2, *SMALL, "--suffix", suffix, "-o", tmp_path / "out")
    assert run(*command)[0] == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    assert set(before) == {f"a-sun-0{suffix}", f"a-sun-1{suffix}"}
    (tmp_path / "out" / f"a-sun-1{suffix}").unlink()
    code, stdout, stderr = run(*command, "--json", "--quiet")
    document = json.loads(stdout)
    assert (code, len(document["done"]), document["failed"]) == (0, 1, [])
    file = str(tmp_path / "out" / f"a-sun-0{suffix}")
    assert document["skipped"] == [{"file": file, "prompt": "a sun", "seed": 0, "reason": "finished by an earlier run"}]
    assert stderr == f"skipped {file}: an earlier run finished it (--overwrite draws it again)\n"
    assert (tmp_path / "out" / f"a-sun-0{suffix}").read_bytes() == before[f"a-sun-0{suffix}"]
    code, stdout, _ = run(*command)
    assert (code, stdout) == (0, "0 of 2 rendered, 2 skipped, 0 failed\n")
    code, stdout, _ = run(*command, "--overwrite")
    assert (code, stdout.splitlines()[-1]) == (0, "2 of 2 rendered, 0 skipped, 0 failed")


def test_more_of_the_same_goes_on_from_what_is_there(tmp_path: Path) -> None:
    for count, rendered in ((1, 1), (3, 2)):
        code, stdout, _ = run("a sun", "--count", count, *SMALL, "-o", tmp_path / "a.png")
        assert (code, stdout.splitlines()[-1].split()[0]) == (0, str(rendered))
    assert names(tmp_path) == ["a-1.png", "a-2.png", "a-3.png"]


@pytest.mark.parametrize(
    "change", [("--steps", 3), ("--negative", "rain"), ("--bits", 16), ("--seed", 1), ("--init", "IN"), ("--model", "OTHER")]
)
def test_a_file_of_another_request_is_in_the_way(change: tuple[str, object], tmp_path: Path, eps_folder: Path) -> None:
    Image.new("RGB", (96, 64), "grey").save(tmp_path / "in.png")
    values = {"IN": tmp_path / "in.png", "OTHER": eps_folder}
    command = ("a sun", "--count", 2, *SMALL, "-o", tmp_path / "a.png")
    assert run(*command)[0] == 0
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    code, stdout, stderr = run(*command, change[0], values.get(str(change[1]), change[1]))
    assert (code, stdout) == (2, "")
    assert "a-1.png: exists already, and is another picture than this; give --overwrite or another name" in stderr
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_how_it_runs_does_not_make_it_another_request(tmp_path: Path) -> None:
    command = ("a sun", "--count", 1, *SMALL, "-o", tmp_path / "a.png")
    assert run(*command)[0] == 0
    assert "1 skipped" in run(*command, "--vram", "1GB", "--attention", "sdpa", "--journal-seconds", 1)[1]


def test_a_picture_that_was_changed_since_is_not_taken_for_the_finished_one(tmp_path: Path) -> None:
    """Its text survives many editors; its size tells. An enlargement of it does not carry the mark."""
    command = ("a sun", "--count", 1, *SMALL, "-o", tmp_path / "a.png")
    assert run(*command)[0] == 0
    hires.upscale(tmp_path / "a-1.png", scale=2, output=tmp_path / "large.png")
    assert "hires:request" in read_text(tmp_path / "a-1.png") and "hires:request" not in read_text(tmp_path / "large.png")
    hires.upscale(tmp_path / "a-1.png", scale=1, output=tmp_path / "same.png")
    (tmp_path / "same.png").replace(tmp_path / "a-1.png")
    assert "another picture than this" in run(*command)[2]
    assert run(*command, "--overwrite")[0] == 0
    with Image.open(tmp_path / "a-1.png") as opened:
        half, info = opened.resize((48, 32)), opened.info
    kept = PngImagePlugin.PngInfo()
    for key, value in info.items():
        if isinstance(value, str):
            kept.add_text(key, value)
    half.save(tmp_path / "a-1.png", pnginfo=kept)
    assert "hires:request" in read_text(tmp_path / "a-1.png") and "another picture than this" in run(*command)[2]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["-o", "out", "--suffix", ".gif"], "must end in .png"),
        (["-o", "a.gif"], "must end in .png"),
        (["-o", "out", "--size", "20000x16", "--suffix", ".webp"], "16383"),
        (["-o", "none/a.png"], "the folder none does not exist"),
        (["-o", "none/out"], "the folder none does not exist"),
        (["-o", "file"], "is a file; give the name of a folder"),
        (["-o", "b.png"], "b-2.png: exists already, and is another picture"),
        (["-o", "out", "--count", "0"], "--count 0: give a number of pictures from 1 to 10000"),
        (["-o", "out", "--count", "many"], "'many'"),
        (["-o", "out", "--seed", str(2**63 - 1), "--count", "2"], f"--seed {2**63}"),
        (["-o", "out", "--steps", "0"], "--steps 0"),
        (["-o", "out", "--model", "demmo"], "did you mean 'demo'"),
        (["-o", "out", "--sampler", "eular"], "did you mean 'euler'"),
        (["-o", "out", "--size", "2048x2048", "--vram", "1MB"], "would do"),
        (["-o", "a.png", "--suffix", ".tif"], "--suffix .tif: applies to the files of a folder"),
        (["-o", "out", "--profile", "a.json"], "--profile a.json: is of one picture; give one prompt without --count"),
        (["-o", "out", "--memory-timeline", "a.png"], "--memory-timeline a.png: is of one picture"),
        (["-o", "out", "--preview", "a.jpg"], "must end in .png"),
        (["-o", "out", "--suffix", "/../a.png"], "--suffix /../a.png: give an ending such as .tif"),
        (["-o", "x" * 252 + ".png"], "bytes; give one of at most 240"),
        (["-o", "x" * 300], "cannot be written (File name too long)"),
        (["-o", "~nosuchuser/out"], "nosuchuser"),
        (["-o", "out", "--resume"], "--resume: nothing of out"),
        (["-o", "out", "--resume", "--no-journal"], "--no-journal"),
        (["-o", "out", "--strength", "0.5"], "--strength 0.5"),
    ],
)  # fmt: skip
def test_everything_is_checked_before_the_first_is_drawn(
    wrong: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "load_family", lambda *_: pytest.fail("a model was loaded"))
    for name in ("b-2.png", "file"):
        (tmp_path / name).write_text("keep me")
    code, stdout, stderr = run(SUN, MOON, *([] if "--size" in wrong else SMALL[:2]), *wrong)
    assert (code, stdout, "Traceback" in stderr) == (2, "", False), stderr
    assert words in stderr and stderr.count("error: ") == (words != "'many'")
    assert names(tmp_path) == ["b-2.png", "file"] and (tmp_path / "b-2.png").read_text() == "keep me"


def test_a_prompt_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    code, _, stderr = run(SUN, MOON, SUN, *SMALL, "-o", tmp_path / "out")
    assert (code, f"PROMPT '{SUN}': is given more than once" in stderr, names(tmp_path)) == (2, True, [])


def test_a_picture_that_fails_is_told_and_the_others_are_drawn(tmp_path: Path, failing: Any, calls: Counter[str]) -> None:
    failing(2, WriteError("output b: no room"))
    code, stdout, stderr = run("a sun", "--count", 3, *SMALL, "-o", tmp_path / "a.png", "--json")
    document = json.loads(stdout)
    assert (code, [done["seed"] for done in document["done"]]) == (1, [0, 2])
    file = str(tmp_path / "a-2.png")
    assert document["failed"] == [{"file": file, "prompt": "a sun", "seed": 1, "error": "--output b: no room"}]
    assert f"failed {file}: --output b: no room" in stderr and calls["load_family"] == 1
    assert [name for name in names(tmp_path) if not name.startswith(".")] == ["a-1.png", "a-3.png"]


@pytest.mark.parametrize("error", [Cancelled("stop"), KeyboardInterrupt()])
def test_what_is_finished_stays_and_the_same_command_goes_on(error: BaseException, tmp_path: Path, failing: Any) -> None:
    """Stopped in the second of three: its journal is gone on with, bit for bit; the first is not drawn again."""
    command = ("a sun", "--count", 3, *SMALL, "-o", tmp_path / "a.png", "--journal-seconds", 0)
    failing(2, error)
    code, stdout, stderr = run(*command, "--json")
    document = json.loads(stdout)
    assert (code, [done["seed"] for done in document["done"]], document["failed"]) == (130, [0], [])
    assert ("stop" in stderr) and names(tmp_path) == [".a-2.png.hires", "a-1.png"]
    jobs = CliRunner().invoke(app, ["jobs", str(tmp_path)]).stdout
    assert "a-2.png" in jobs and "a sun" in jobs
    refused = run(*command, "--negative", "rain")
    assert refused[0] == 2 and ("a-1.png: exists already" in refused[2] or "differs in request.negative" in refused[2])
    code, stdout, stderr = run(*command, "--resume")
    assert (code, stdout.splitlines()[-1]) == (0, "2 of 3 rendered, 1 skipped, 0 failed"), stderr
    assert names(tmp_path) == ["a-1.png", "a-2.png", "a-3.png"]
    for seed in range(3):
        with Image.open(tmp_path / f"a-{seed + 1}.png") as opened:
            assert np.array_equal(np.asarray(opened), fresh("a sun", seed))


def test_an_unfinished_render_of_another_request_is_found_before_anything_is_drawn(tmp_path: Path, failing: Any) -> None:
    command = ("a sun", "--count", 3, *SMALL, "-o", tmp_path / "a.png", "--journal-seconds", 0)
    failing(2, Cancelled("stop"))
    assert run(*command)[0] == 130
    (tmp_path / "a-1.png").unlink()
    code, stdout, stderr = run(*command, "--negative", "rain")
    assert (code, stdout, names(tmp_path)) == (2, "", [".a-2.png.hires"])
    assert "a-2.png: an unfinished render is there that differs in request.negative" in stderr and "--restart" in stderr
    assert run(*command, "--negative", "rain", "--restart")[0] == 0
    assert names(tmp_path) == ["a-1.png", "a-2.png", "a-3.png"]


def test_a_request_error_of_the_first_picture_is_exit_code_2(tmp_path: Path, failing: Any) -> None:
    failing(1, RequestError("attention fast: no such backend"))
    code, stdout, stderr = run("a sun", "--count", 3, *SMALL, "-o", tmp_path / "a.png", "--json", "--no-journal")
    assert (code, stdout, names(tmp_path)) == (2, "", [])
    assert "error: --attention fast" in stderr


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again(tmp_path: Path) -> None:
    """A real signal in a process of its own."""
    command = ("render", "a sun", "--count", "3", "--size", "512x512", "--steps", "30", "-o", str(tmp_path / "out"))
    shown = tmp_path / "stderr"
    process = Command(*command, stderr=shown)
    while not (shown.exists() and "2/3 load" in shown.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "stopped; finished pictures stay" in shown.read_text() and "Traceback" not in shown.read_text()
    assert "1 of 3 rendered" in process.stdout.read().decode()
    assert names(tmp_path / "out") == [".a-sun-1.png.hires", "a-sun-0.png"]
    again = Command(*command, stderr=shown)
    assert again.wait(120) == 0
    assert "skipped" in shown.read_text() and names(tmp_path / "out") == ["a-sun-0.png", "a-sun-1.png", "a-sun-2.png"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a red disk", "a-red-disk"),
        ("  A red disk, 4K!! ", "a-red-disk-4k"),
        ("../../etc/passwd", "etc-passwd"),
        ("snake_case & tabs\tand\nlines", "snake-case-tabs-and-lines"),
        ("ein grüner Kreis für Ä", "ein-grüner-kreis-für-ä"),
        ("赤い円", "赤い円"),
        ("ﬁne ＦＵＬＬ", "fine-full"),
        ("", "picture"),
        ("🙂 !?", "picture"),
        ("\ud800x", "x"),
        ("word " * 40, "-".join(["word"] * 12)),
        ("x" * 300, "x" * 60),
        ("円" * 300, "円" * 20),
    ],
)
def test_slugs(prompt: str, name: str) -> None:
    assert batch.slug(prompt) == name and len(name.encode()) <= batch.SLUG_BYTES


def test_prompts_of_one_slug_get_names_of_their_own(tmp_path: Path) -> None:
    """Whatever their order; and a prompt that ends in a number is not another one with that seed."""
    prompts = ["a disk", "A disk!", "a disk 1", "!", "?"]
    one, other = (
        batch.pictures_of(given, range(2), batch.Place.of(f"{tmp_path}/out/", ".tif")) for given in (prompts, prompts[::-1])
    )
    assert len({picture.path.name.lower() for picture in one}) == 10
    assert {(p.prompt, p.seed, p.path) for p in one} == {(p.prompt, p.seed, p.path) for p in other}
    found = {picture.path.name for picture in one}
    assert {"a-disk-1-0.tif", "a-disk-1-1.tif"} <= found and "a-disk-1.tif" not in found
    assert sum(bool(re.fullmatch(r"a-disk-[0-9a-f]{8}-0\.tif", name)) for name in found) == 2


@pytest.mark.parametrize(
    ("output", "folder"),
    [("out", True), ("out/", True), ("out.png/", True), ("out.png", False), (".", True), ("a.b/out", True)],
)
def test_what_is_a_folder(output: str, folder: bool) -> None:
    assert batch.Place.of(output, None).is_folder == folder


def test_numbers_go_before_the_ending() -> None:
    found = [
        str(picture.path) for picture in batch.pictures_of(["a", "b"], range(7, 9), batch.Place.of("x.y/my.out.jpg", None))
    ]
    assert found == [f"x.y/my.out-{number}.jpg" for number in (1, 2, 3, 4)]


def test_events_of_several_pictures_tell_of_all_of_them() -> None:
    heard: list[Event] = []
    listener = numbered(heard.append, 2, 8)
    assert listener is not None and numbered(None, 2, 8) is None
    event = Event(stage="base", done=1, total=2, step=3, steps=4, preview="a picture", fraction=0.5, eta_seconds=10.0)
    listener(event)
    listener(replace(event, eta_seconds=None))
    listener(replace(event, fraction=1.0, eta_seconds=0.0))
    told = replace(event, stage="2/8 base", fraction=1.5 / 8, eta_seconds=10.0 + 6 * 20.0)
    assert heard[:2] == [told, replace(told, eta_seconds=None)], "the six to come need as long as this one"
    assert (heard[2].fraction, heard[2].eta_seconds) == (0.25, None)
