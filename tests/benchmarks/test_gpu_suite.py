"""The GPU suite on toys: every piece runs, is recorded once, and goes on; what fails is said."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu.pieces import SLICES, Piece, Suite, pieces
from benchmarks.gpu.record import Record, summary
from benchmarks.gpu_suite import main

DRY = Suite(device=torch.device("cpu"), dry=True)


def test_every_slice_has_pieces_of_different_names() -> None:
    for suite in (DRY, Suite(device=torch.device("cuda:0"), dry=False)):
        for name in SLICES:
            names = [piece.name for piece in pieces(suite, name)]
            assert names and len(set(names)) == len(names)
    assert sum("8192" in piece.name for piece in pieces(Suite(device=torch.device("cuda:0"), dry=False), "vae")) == 4


def test_one_piece_of_each_slice_runs_on_toys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: [list(pieces(DRY, name))[-1]] for name in SLICES if name not in ("tests", "kernels")}
    monkeypatch.setattr(gpu_suite, "pieces", lambda suite, name: iter(some.get(name, [])))
    assert main(["--dry", "--out", str(tmp_path)]) == 0
    lines = Record(tmp_path).lines()
    assert [line["slice"] for line in lines] == ["vae", "denoise", "render", "budgets"]
    assert all(row["state"] == "ran" for line in lines for row in line["rows"])
    exact, theirs = lines[0]["rows"]
    assert exact["way"] == "hires, exact" and exact["psnr_db"] > 60 and theirs["way"] == "diffusers tiling"
    assert lines[3]["rows"][0]["budget_gb"] == 24 and lines[3]["rows"][0]["pflop"] >= 0
    page = (tmp_path / "summary.md").read_text()
    assert page in capsys.readouterr().out and "## budgets: 1 pieces" in page
    with (tmp_path / "gpu_vae.csv").open() as opened:
        assert [row["way"] for row in csv.DictReader(opened)] == ["hires, exact", "diffusers tiling"]
    before = (tmp_path / "gpu_suite.jsonl").read_bytes()
    assert main(["--dry", "--out", str(tmp_path)]) == 0, "finished pieces are not done again"
    assert (tmp_path / "gpu_suite.jsonl").read_bytes() == before


def test_failures_are_lines_and_time_ends_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run(name: str) -> Any:
        calls.append(name)
        if name == "bad" and calls.count("bad") == 1:
            raise RuntimeError("no such kernel")
        return [{"state": "ran"}]

    made = [Piece(name=name, run=lambda name=name: run(name)) for name in ("good", "bad", "last")]
    monkeypatch.setattr(gpu_suite, "pieces", lambda suite, name: iter(made))
    arguments = ["--dry", "--out", str(tmp_path), "--slice", "vae"]
    assert main([*arguments, "--minutes", "0"]) == 0 and calls == [], "nothing begins after the last minute"
    assert "3 left" in (tmp_path / "summary.md").read_text()
    assert main(arguments) == 1 and calls == ["good", "bad", "last"]
    assert "FAILED bad: RuntimeError: no such kernel" in (tmp_path / "summary.md").read_text()
    assert main(arguments) == 1 and len(calls) == 3
    (tmp_path / "gpu_suite.jsonl").open("a").write('{"torn": ')
    assert main([*arguments, "--again"]) == 0 and calls[3:] == ["bad"]
    assert len(Record(tmp_path).lines()) == 3 and "2 left" in summary(Record(tmp_path).lines(), {"vae": 2})


def test_without_a_card_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--slice", "vae"]) == 2 and "--dry" in capsys.readouterr().err
    assert sys.modules["benchmarks.gpu_suite"] is gpu_suite
