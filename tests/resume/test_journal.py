"""Stopped anywhere and gone on with: the same pixels. What is torn, changed or locked is never trusted."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hires
from hires.checkpoints.noise_levels import vp_sigmas
from hires.errors import Cancelled, OutputError, RequestError, WriteError
from hires.events import Event
from hires.options.render import JournalOptions
from hires.resume import journal as journals
from hires.resume.journal import FileJournal, differences, folder_of, open_journal
from hires.resume.records import packed, read_whole, unpacked
from hires.resume.unfinished import clean, unfinished
from hires.sampling.conditioning import Conditioning
from hires.sampling.noise import CanvasNoise, StepNoise
from hires.sampling.registry import SAMPLER_FACTS
from hires.sampling.samplers import find_sampler
from hires.tiling.geometry import Box

pytestmark = pytest.mark.usefixtures("warm")

PROMPT = "a sun over a lake"
SMALL: dict[str, Any] = {"size": "400x272", "steps": 6, "seed": 5, "vram": "60MB"}  # so small that it decodes in bands
STOPS = [("base", 4), ("refine 1", 5), ("decode", 60), ("write", 1)]
CHANGES = [{"seed": 6}, {"size": "384x272"}, {"negative": "rain"}, {"weights": "int8"}]
AT_ONCE = JournalOptions(seconds=0)
TABLE = vp_sigmas("scaled_linear", 0.00085, 0.012)


def stop_after(count: int, stage: str | None = None) -> Any:
    """An `on_event` that cancels at the count-th event of a stage, or of all."""
    seen = 0

    def on_event(event: Event) -> None:
        nonlocal seen
        seen += stage is None or event.stage == stage
        if seen == count:
            raise Cancelled("stopped by the test")

    return on_event


@pytest.fixture(scope="module")
def undisturbed() -> np.ndarray[Any, Any]:
    return hires.render(PROMPT, **SMALL).pixels  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SAMPLER_FACTS)
def test_every_sampler_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Stopped before each evaluation, whatever the sampler keeps between its steps."""
    sigmas = torch.tensor([14.0, 6.0, 2.5, 1.0, 0.4, 0.0])
    noise = CanvasNoise(3, 0, Box(0, 0, 6, 5), 4, torch.device("cpu"))
    x = noise(-1) * 14.0
    calls = 0

    def estimate(x: Tensor, sigma: float, cond: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == least:
            raise Cancelled("stopped")
        return torch.tanh(x * 0.3) + 0.05 * torch.sin(5 * x)

    least = 0
    expected = find_sampler(name)(estimate, x, sigmas, None, StepNoise(source=noise, table=TABLE))
    total = calls
    for stop in {1, 2, 3, total // 2, total}:
        folder = tmp_path / f"stop-{stop}"
        folder.mkdir()
        calls, least = 0, stop
        with pytest.raises(Cancelled):
            find_sampler(name)(
                FileJournal(folder, 0).recorded(1, estimate, lambda: None),
                x,
                sigmas,
                None,
                StepNoise(source=noise, table=TABLE),
            )
        calls, least = 0, 0
        found = find_sampler(name)(
            FileJournal(folder, 0).recorded(1, estimate, lambda: None), x, sigmas, None, StepNoise(source=noise, table=TABLE)
        )
        assert torch.equal(found, expected), stop
        assert calls == total - stop + 1, "nothing is evaluated twice"


@pytest.mark.parametrize(("stage", "count"), STOPS)
def test_a_render_stopped_in_any_stage_goes_on(stage: str, count: int, undisturbed: Any, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(count, stage), **SMALL)
    assert folder_of(output).is_dir() and not output.exists()
    (job,) = unfinished(tmp_path)
    assert job.output == str(output) and job.size == "400x272" and job.prompt == PROMPT and job.held_bytes > 0
    result = hires.render(PROMPT, output=output, journal=JournalOptions(resume=True), **SMALL)
    assert np.array_equal(result.pixels, undisturbed)
    assert np.array_equal(np.asarray(Image.open(output)), undisturbed)
    assert not folder_of(output).exists() and not unfinished(tmp_path)


@pytest.mark.parametrize(("stage", "count"), [pytest.param(*STOPS[1], marks=pytest.mark.slow), STOPS[2]])
def test_an_engine_that_was_stopped_goes_on(stage: str, count: int, undisturbed: Any, tmp_path: Path) -> None:
    """The same engine and another one, each used for something else before (law 7 for engines)."""
    drawn = {name: value for name, value in SMALL.items() if name != "vram"}
    with hires.load(vram=SMALL["vram"]) as first, hires.load(vram=SMALL["vram"]) as second:
        for engine in (first, second):
            output = tmp_path / f"{engine is first}.png"
            first.render("a hill", size="96x64", steps=1)
            with pytest.raises(Cancelled):
                first.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(count, stage), **drawn)
            engine.render("a hill", size="64x96", steps=2)
            result = engine.render(PROMPT, output=output, journal=JournalOptions(resume=True), **drawn)
            assert np.array_equal(result.pixels, undisturbed) and not folder_of(output).exists()


def test_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the text towers nor the stages before run a second time."""
    output = tmp_path / "a.png"
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(2, "decode"), **SMALL)
    monkeypatch.setattr("hires.pipelines.load.encode", lambda *_: pytest.fail("the prompts are known"))
    monkeypatch.setattr("hires.pipelines.progressive.run_stage", lambda *_: pytest.fail("the stages are done"))
    hires.render(PROMPT, output=output, **SMALL)
    assert output.exists()


@pytest.mark.parametrize(
    ("stage", "count", "shorter"), [("refine 1", 5, False), pytest.param("decode", 60, True, marks=pytest.mark.slow)]
)
def test_a_journal_torn_anywhere_is_never_trusted(
    stage: str, count: int, shorter: bool, undisturbed: Any, tmp_path: Path
) -> None:
    chance, output = random.Random(count), tmp_path / "a.png"
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(count, stage), **SMALL)
    files = [file for file in sorted(folder_of(output).iterdir()) if file.name != "lock"]
    for file in chance.sample(files, max(1, len(files) // 2)):
        content = file.read_bytes()
        kept = chance.randrange(len(content))
        torn = bytes([content[kept] ^ 1]) + content[kept + 1 :]
        file.write_bytes(content[:kept] if shorter else content[:kept] + torn)
    assert np.array_equal(hires.render(PROMPT, output=output, **SMALL).pixels, undisturbed)


def test_a_render_of_an_earlier_version_is_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records could be gone on with, to a picture that neither version draws."""
    output = tmp_path / "a.png"
    with monkeypatch.context() as earlier:
        earlier.setattr("hires.resume.fingerprint.SCHEMA", 2)
        with pytest.raises(Cancelled):
            hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(4, "base"), **SMALL)
    job = (tmp_path / ".a.png.hires" / "job.json").read_bytes()
    with pytest.raises(RequestError, match=r"begun by another version of hires.*`restart`"):
        hires.render(PROMPT, output=output, **SMALL)
    assert (tmp_path / ".a.png.hires" / "job.json").read_bytes() == job
    assert not output.exists()


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_request_is_noticed_and_refused(change: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(3), **SMALL)
    with pytest.raises(RequestError, match=rf"differs in .*{next(iter(change))}.*`restart`"):
        hires.render(PROMPT, output=output, **(SMALL | change))
    assert folder_of(output).is_dir(), "it is still there"
    if "seed" in change:
        result = hires.render(PROMPT, output=output, journal=JournalOptions(restart=True), **(SMALL | change))
        assert result.path == output and not folder_of(output).exists()


def test_a_changed_model_file_and_version_are_noticed(tmp_path: Path, eps_folder: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(eps_folder, model)
    output = tmp_path / "a.png"
    options = SMALL | {"model": str(model), "steps": 2}
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(6), **options)
    weights = next((model / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RequestError, match=r"differs in model\.network/.*safetensors"):
        hires.render(PROMPT, output=output, **options)
    job = {"hires": "0.0.1", "request": {"seed": 1, "size": "1x1"}}
    assert differences(job, {"hires": "0.0.2", "request": {"seed": 1, "size": "1x1"}}) == ['hires ("0.0.1", now "0.0.2")']


def test_resume_with_nothing_to_go_on_from_says_so(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="resume: nothing unfinished is there"):
        hires.render(PROMPT, output=tmp_path / "a.png", journal=JournalOptions(resume=True), **SMALL)
    with pytest.raises(RequestError, match="give one of the two"):
        JournalOptions(resume=True, restart=True)
    with pytest.raises(RequestError, match="seconds -1"):
        JournalOptions(seconds=-1)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = open_journal(tmp_path / "a.png", {"a": 1})
    with pytest.raises(OutputError, match="another process renders this"):
        open_journal(tmp_path / "a.png", {"a": 1})
    assert clean(unfinished(tmp_path)) == [], "what is worked on stays"
    first.close()
    assert [job.output for job in clean(unfinished(tmp_path))] == [str(tmp_path / "a.png")]
    assert not unfinished(tmp_path)


def test_writes_wait_for_their_time(tmp_path: Path) -> None:
    now = [0.0]
    journal = FileJournal(tmp_path, 20, clock=lambda: now[0])
    for step in range(5):
        now[0] = 9.0 * step
        journal.keep(f"x{step}", torch.full((2,), float(step)))
    assert {file.name for file in tmp_path.iterdir()} == {"x0", "x1", "x2", "x3"}  # at 0, at 27 with those that waited
    assert torch.equal(journal.tensor("x4"), torch.full((2,), 4.0))  # type: ignore[arg-type]
    journal.close()
    assert read_whole(tmp_path / "x4") is not None


def test_a_full_disk_ends_the_journal_and_not_the_render(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal, real = FileJournal(tmp_path, 0), journals.write_whole

    def full(file: Path, content: bytes) -> None:
        if len(content) > 400:
            raise WriteError("journal: no space left")
        real(file, content)

    monkeypatch.setattr(journals, "write_whole", full)
    journal.keep("small", torch.zeros(1))
    journal.keep("large", torch.zeros(1000))
    journal.keep("small again", torch.zeros(1))
    assert {file.name for file in tmp_path.iterdir()} == {"small"} and "no space left" in caplog.text


def test_conditions_come_back_as_they_were() -> None:
    texts = [
        Conditioning(tokens=torch.randn(1, 7, 5), pooled=torch.randn(1, 3), cell_px=16),
        Conditioning(tokens=torch.randn(1, 7, 5).bfloat16(), mask=torch.arange(7)[None] < 4),
    ]
    back = unpacked(packed(texts))
    assert back is not None
    for a, b in zip(texts, back, strict=True):
        assert torch.equal(a.tokens, b.tokens) and a.tokens.dtype == b.tokens.dtype and a.cell_px == b.cell_px
        assert (a.mask is None) == (b.mask is None) and (a.pooled is None) == (b.pooled is None)
    assert unpacked(b"nonsense") is None


def command(output: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "hires", "render", PROMPT, "--size", "512x512", "--steps", "8", "-o", str(output),
            "--quiet", "--journal-seconds", "0", *more]  # fmt: skip


def killed(output: Path, after: float) -> bool:
    """Start a render and kill it; whether it was still at work."""
    process = subprocess.Popen(command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    return False


def killed_with(output: Path, files: int, line: list[str]) -> bool:
    """Start a render and kill it as soon as its journal has written so many files; whether it was still at work."""
    process, seen = subprocess.Popen(line, stderr=subprocess.DEVNULL), set()
    while process.poll() is None:
        seen |= {file.name for file in folder_of(output).glob("*") if not file.name.startswith(".")}
        if len(seen) >= files:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


KILLS = [i / 50 for i in range(50)]  # in the fast suite a server is killed, tests/server
BANDS = ("--vram", "60MB")  # so small that it decodes in bands


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float]:
    """The pixels of an uninterrupted render by the same command, and the seconds that it takes."""
    output = tmp_path_factory.mktemp("whole") / "a.png"
    begun = time.monotonic()
    subprocess.run(command(output), check=True, capture_output=True)
    return np.asarray(Image.open(output)), time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.parametrize("share", KILLS)
def test_killed_at_any_moment_and_resumed_is_never_killed(share: float, whole: Any, tmp_path: Path) -> None:
    pixels, seconds = whole
    output = tmp_path / "a.png"
    gone_on_with(killed(output, seconds * share), output, pixels)


@pytest.mark.slow
def test_killed_after_every_file_of_a_journal_and_resumed_is_never_killed(tmp_path: Path) -> None:
    """None of these moments lies in start-up: conditions, every evaluation, stages, bands, until the picture is written."""
    output = tmp_path / "first.png"
    subprocess.run(command(output, *BANDS), check=True, capture_output=True)
    pixels, kills = np.asarray(Image.open(output)), []
    for files in itertools.count(1):
        output = tmp_path / str(files) / "a.png"
        output.parent.mkdir()
        if not killed_with(output, files, command(output, *BANDS)):
            break
        kept = folder_of(output)
        kills.append(sorted(file.name for file in kept.iterdir()) if kept.exists() else [])
        gone_on_with(True, output, pixels, BANDS)
    assert any("stage-1" in names for names in kills) and sum("rows-00000000" in names for names in kills) >= 2, kills
    print(len(kills), "kills")


USED = """import sys, hires
with hires.load() as engine:
    engine.render("a hill", size="96x64", steps=1)
    engine.render(sys.argv[1], size="512x512", steps=8, output=sys.argv[2], journal=hires.JournalOptions(seconds=0))
"""


@pytest.mark.slow
def test_a_killed_engine_goes_on_in_a_used_one(whole: Any, tmp_path: Path) -> None:
    pixels, _ = whole
    with hires.load() as engine:
        for files in range(1, 40, 3):
            output = tmp_path / str(files) / "a.png"
            output.parent.mkdir()
            if not killed_with(output, files, [sys.executable, "-c", USED, PROMPT, str(output)]):
                break
            engine.render("a lake", size="64x96", steps=2)
            result = engine.render(PROMPT, size="512x512", steps=8, output=output)
            assert np.array_equal(result.pixels, pixels) and [file.name for file in output.parent.iterdir()] == ["a.png"]
        assert files > 10, "it was killed in several places"


def gone_on_with(stopped: bool, output: Path, pixels: Any, more: tuple[str, ...] = ()) -> None:
    """The same command again where a render was stopped; what is there then is the picture and nothing beside it."""
    if stopped:
        assert not output.exists() or np.array_equal(np.asarray(Image.open(output)), pixels)
        output.unlink(missing_ok=True)
        subprocess.run(command(output, *more), check=True, capture_output=True)
    assert np.array_equal(np.asarray(Image.open(output)), pixels)
    assert [file.name for file in output.parent.iterdir()] == ["a.png"]


@pytest.mark.slow
def test_the_jobs_command_lists_and_cleans(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=tmp_path / "a.png", journal=AT_ONCE, on_event=stop_after(9), **SMALL)

    def jobs(*more: str) -> Any:
        command = [sys.executable, "-m", "hires", "jobs", str(tmp_path), "--json", *more]
        done = subprocess.run(command, check=True, capture_output=True)
        return json.loads(done.stdout)

    (job,) = jobs()["jobs"]
    assert job["output"].endswith("a.png") and "evaluations" in job["progress"]
    assert jobs("--clean")["removed"] == [job["output"]]
    assert jobs()["jobs"] == []
