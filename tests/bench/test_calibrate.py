"""What was measured is kept, read again, and what plans go by; what is damaged counts as never measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hires
from hires.bench import calibrate
from hires.checkpoints.model import ModelSpec
from hires.devices.calibration import Calibration, cache_folder, calibrated, file_of, load, save
from hires.devices.machines import described_card, host_device
from hires.errors import WriteError
from hires.images.formats import read_text
from hires.options.render import RenderRequest
from hires.planning.planner import plan
from hires.tiling.geometry import Size
from hires.units import parse_bytes

ROW = Calibration(
    device="a card with 22.35 GiB", flops=2e14, attention_flops=4e14, copy_bytes_per_second=25e9, call_seconds=0.01, slack=0.05
)
NEGATIVE = {"device": "a", "flops": -1, "attention_flops": 1, "copy_bytes_per_second": 1, "call_seconds": 1, "slack": 0}
DAMAGED = (
    "", "{", "[]", '{"schema": 2, "devices": {}}', '{"schema": 1, "devices": {"a": {"flops": 1}}}',
    json.dumps({"schema": 1, "devices": {"a": NEGATIVE}}),
)  # fmt: skip


def test_devices_are_kept_side_by_side(tmp_path: Path) -> None:
    other = replace(ROW, device="CPU, 2 cores", copy_bytes_per_second=0)
    save(tmp_path / "new", ROW)
    assert save(tmp_path / "new", other) == file_of(tmp_path / "new")
    assert load(tmp_path / "new") == {ROW.device: ROW, other.device: other}


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_damaged_counts_as_never_measured(content: str, tmp_path: Path) -> None:
    file_of(tmp_path).write_text(content)
    assert load(tmp_path) == {}
    assert load(tmp_path / "nowhere") == {}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="XDG_CACHE_HOME"):
        save(tmp_path / "file" / "below", ROW)
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/hires")
    assert cache_folder({}) == Path.home() / ".cache" / "hires"


def test_plans_go_by_what_was_measured(demo: ModelSpec) -> None:
    request, card = RenderRequest(prompt="", size=Size(2048, 2048)), described_card(parse_bytes("24GB"))
    fast = calibrated(card, {ROW.device: ROW})
    guess, measured = plan(request, demo, card), plan(request, demo, fast)
    assert measured.seconds < guess.seconds
    assert [c.flops for c in measured.costs] == [c.flops for c in guess.costs]
    assert calibrated(card, {}) == card and calibrated(host_device(), {ROW.device: ROW}).flops == host_device().flops
    tight = described_card(parse_bytes("600MB"))
    assert plan(request, demo, tight).peak_bytes <= tight.budget_bytes
    slack = calibrated(tight, {tight.name: replace(ROW, slack=0.5)})
    assert plan(request, demo, slack).peak_bytes <= tight.budget_bytes / 1.5


def test_measuring_gives_rates_that_a_machine_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS", 0.05)
    said: list[str] = []
    found = calibrate.calibrate(torch.device("cpu"), said.append)
    assert found.device == host_device().name
    assert 1e8 < found.attention_flops < 1e15 and 1e8 < found.flops < 1e15 and 0 < found.call_seconds < 1
    assert found.copy_bytes_per_second == found.slack == 0 and found.attention_backend in " ".join(said)


@pytest.mark.slow
def test_the_command_measures_once_and_plans_read_it(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    begun = time.monotonic()
    command = [sys.executable, "-m", "hires", "bench", "calibrate", "--json"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert time.monotonic() - begun < 120
    document = json.loads(done.stdout)
    assert load(tmp_path / "hires")[document["device"]].flops == document["flops"]


def test_a_result_holds_predictions_beside_what_was_measured(tmp_path: Path) -> None:
    result = hires.render("a sun", size="400x272", steps=2, output=tmp_path / "a.png")
    rows = result.to_json()["predictions"]
    assert [row["stage"] for row in rows] == ["base", "refine 1", "decode"]
    for row in rows:
        assert row["predicted_peak_bytes"] > 0 and row["measured_peak_bytes"] > 0
        assert row["predicted_seconds"] > 0 and row["measured_seconds"] >= 0
    assert json.loads(read_text(tmp_path / "a.png")["hires:predictions"]) == rows
