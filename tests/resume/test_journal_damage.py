"""What happens around a journal: full disks, foreign folders, other machines, files that change or go."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hires
from hires.errors import Cancelled, OutputError, RequestError, WriteError
from hires.events import Event
from hires.images.png import PngWriter
from hires.images.whole import save_png
from hires.options.render import JournalOptions
from hires.resume import fingerprint
from hires.resume import journal as journals
from hires.resume.journal import FileJournal, differences, folder_of, open_journal
from hires.resume.records import hold
from hires.resume.unfinished import clean, unfinished
from hires.sampling.conditioning import Conditioning
from tests.resume.test_journal import AT_ONCE, PROMPT, SMALL, stop_after

pytestmark = pytest.mark.usefixtures("warm")

JOB = {"request": {"seed": 1}}
LATENTS = torch.arange(64.0).view(1, 4, 4, 4)


def evaluated(journal: FileJournal, times: int) -> int:
    """Estimates at falling noise levels; how many of them the journal did not have."""
    calls = 0

    def denoise(x: torch.Tensor, sigma: float, cond: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x * sigma

    recorded = journal.recorded(0, denoise, lambda: None)
    for step in range(times):
        assert torch.equal(recorded(LATENTS, 9.0 - step, None), LATENTS * (9.0 - step))
    return calls


def test_a_disk_that_is_full_at_a_stage_s_end_keeps_its_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FileJournal(tmp_path, 0)
    evaluated(journal, 3)
    with monkeypatch.context() as patched:
        patched.setattr(journals, "write_whole", lambda *_: (_ for _ in ()).throw(WriteError("journal: no space left")))
        journal.finish_stage(0, LATENTS)
    assert evaluated(FileJournal(tmp_path, 0), 3) == 0, "all of them are still there"


def test_rows_of_other_latents_are_not_gone_on_with(tmp_path: Path) -> None:
    rows = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    journal = FileJournal(tmp_path, 0)
    journal.finish_stage(1, LATENTS)
    journal.keep_rows(0, rows)
    journal.keep_rows(4, rows + 1)
    again = FileJournal(tmp_path, 0)
    again.finish_stage(1, LATENTS)
    assert [part.tolist() for part in again.rows()] == [rows.tolist(), (rows + 1).tolist()]
    again.finish_stage(1, LATENTS + 1e-6)
    assert list(again.rows()) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_record_is_trusted_or_a_traceback(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A file cut off, changed or lengthened anywhere is as if it were not there, and the render goes on before it."""
    output = tmp_path_factory.mktemp("torn") / "a.png"
    journal = open_journal(output, JOB, seconds=0)
    journal.keep_texts([Conditioning(tokens=torch.ones(1, 3, 2))])
    evaluated(journal, 3)
    journal.close()
    files = sorted(file for file in folder_of(output).iterdir() if file.name != "lock")
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    tail = data.draw(st.sampled_from([b"", bytes([content[place] ^ 1]) + content[place + 1 :], content[place:] + b"x"]))
    file.write_bytes(content[:place] + tail)
    again = open_journal(output, JOB, seconds=0)
    if file.name == "job.json":
        assert again.texts() is None and evaluated(again, 3) == 3
    else:
        assert (again.texts() is None) == (file.name == "conditioning")
        assert evaluated(again, 3) == (file.name != "conditioning")
    again.remove()


def test_records_of_another_form_are_not_trusted(tmp_path: Path) -> None:
    """Whole by their digest, but not what this version writes."""
    journal = FileJournal(tmp_path, 0)
    for name in ("conditioning", "stage-0", "stage-0-estimate-00000", "rows-00000000"):
        journals.write_whole(tmp_path / name, b"nonsense")
    assert journal.texts() is None and journal.tensor("stage-0") is None and list(journal.rows()) == []
    assert evaluated(journal, 1) == 1
    journals.write_whole(tmp_path / "job.json", b"[1]")
    assert journals.read_job(tmp_path) is None


def test_only_folders_of_renders_are_listed_and_removed(tmp_path: Path) -> None:
    (tmp_path / ".notes.hires").mkdir()
    (tmp_path / ".notes.hires" / "thesis.txt").write_text("mine")
    (tmp_path / ".file.png.hires").write_text("mine")
    open_journal(tmp_path / "a.png", JOB).close()
    assert [Path(job.output).name for job in clean(unfinished(tmp_path))] == ["a.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".file.png.hires", ".notes.hires"]
    with pytest.raises(OutputError, match="other things than an unfinished render"):
        open_journal(tmp_path / "notes", JOB)
    with pytest.raises(WriteError, match="give `journal=None`"):
        open_journal(tmp_path / "file.png", JOB)
    with pytest.raises(RequestError, match="not a folder"):
        unfinished(tmp_path / "nowhere")


def test_a_folder_in_a_journal_is_an_error_with_the_next_move(tmp_path: Path) -> None:
    open_journal(tmp_path / "a.png", JOB).close()
    (folder_of(tmp_path / "a.png") / "sub").mkdir()
    with pytest.raises(WriteError, match="give `journal=None`"):
        open_journal(tmp_path / "a.png", JOB, restart=True)
    assert clean(unfinished(tmp_path)) == [], "what is not ours stays, and is not said to be gone"


def test_a_lock_on_a_folder_that_has_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the lock's file and locking it the other process finished and removed the folder."""
    from hires.resume import records

    real, folder, times = records._lock, tmp_path / ".a.png.hires", []

    def late(opened: Any, where: Path) -> None:
        if not times:
            (folder / "lock").unlink()
            folder.rmdir()
        times.append(1)
        real(opened, where)

    monkeypatch.setattr(records, "_lock", late)
    held = hold(folder)
    assert len(times) == 2 and (folder / "lock").exists()
    with pytest.raises(OutputError, match="another process"):
        hold(folder)
    held.close()


def test_a_file_system_without_locks_is_not_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    open_journal(tmp_path / "a.png", JOB).close()
    assert "has no locks" in caplog.text


def _killed(target: Callable[[Path], None], output: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=target, args=(output,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def _render_killed_in_write(output: Path) -> None:
    real = PngWriter.finish

    def finish(*args: Any) -> None:
        real(*args)
        os.kill(os.getpid(), signal.SIGKILL)

    PngWriter.finish = finish  # type: ignore[method-assign]
    journal = open_journal(output, JOB)
    save_png(output, np.zeros((8, 8, 3), np.uint8), {}, False, journal.folder)


def test_a_kill_while_the_picture_is_written_leaves_nothing_behind(tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    _killed(_render_killed_in_write, output)
    assert [file.name for file in tmp_path.iterdir()] == [".a.png.hires"]
    journal = open_journal(output, JOB)
    assert not list(journal.folder.glob("*.part")) and not list(journal.folder.glob(".*.part"))
    save_png(output, np.zeros((8, 8, 3), np.uint8), {}, False, journal.folder)
    journal.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_a_journal_removed_by_hand_does_not_cost_the_picture(tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "a.png"

    def on_event(event: Event) -> None:
        if event.stage == "refine 1":
            shutil.rmtree(folder_of(output), ignore_errors=True)

    hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=on_event, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("stage", "count"), [("refine 1", 3), ("decode", 4)])
def test_what_is_shown_of_a_resumed_render_comes_to_its_end(stage: str, count: int, tmp_path: Path) -> None:
    output, last = tmp_path / "a.png", {}
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(count, stage), **SMALL)
    result = hires.render(PROMPT, output=output, on_event=lambda event: last.update({event.stage: event}), **SMALL)
    for name in ("base", "refine 1"):
        assert last[name].done == last[name].total and last[name].step == last[name].steps, name
    assert result.stats[0].tiles < last["base"].total, "what the journal had is not counted as work"


def test_a_model_is_known_by_what_is_in_its_files_wherever_they_lie(tmp_path: Path, eps_folder: Path) -> None:
    import shutil

    here, there, output = tmp_path / "here", tmp_path / "elsewhere" / "other", tmp_path / "a.png"
    shutil.copytree(eps_folder, here)
    shutil.copytree(eps_folder, there)
    options = SMALL | {"steps": 2}
    with pytest.raises(Cancelled):
        hires.render(PROMPT, output=output, journal=AT_ONCE, on_event=stop_after(6), model=str(here), **options)
    hires.render(PROMPT, output=output, journal=JournalOptions(resume=True), model=str(there), **options)
    assert output.exists()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 5000), seed=st.integers(0, 9))
def test_a_large_file_changed_anywhere_by_a_part_of_it_is_noticed(size: int, seed: int, tmp_path_factory: Any) -> None:
    """On the scale of a tenth: files above 500 bytes are read at 21 places of 8."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (("READ_WHOLE", 500), ("PROBES", 21), ("PROBED", 8)):
            patched.setattr(fingerprint, name, value)
        rng = np.random.default_rng(seed)
        content = bytearray(rng.bytes(size))
        file = tmp_path_factory.mktemp("print") / "model.safetensors"
        file.write_bytes(content)
        before = fingerprint.fingerprint(file)
        wide = max(1, size // 20 + 1) if size > 500 else 1
        first = int(rng.integers(0, size - wide + 1))
        for place in range(first, first + wide):
            content[place] ^= 1
        file.write_bytes(content)
        assert fingerprint.fingerprint(file) != before
        file.write_bytes(bytes(size + 1))
        assert fingerprint.fingerprint(file) != before


def test_differences_are_named_by_their_places() -> None:
    before = {"plan": {"stages": [{"steps": 8, "name": "base"}, {"steps": 4}]}, "torch": "2.1"}
    now = {"plan": {"stages": [{"steps": 8, "name": "base"}, {"steps": 6}]}, "torch": "2.1", "new": (1, 2)}
    assert differences(before, now) == ["plan.stages.1.steps (4, now 6)", "new (null, now [1, 2])"]
