"""Predicted bytes are never below what full-size networks allocate, and at most a tenth above: a sample, and everything.

All of the sample is run by `python -m benchmarks quick`, which fails where it does not hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import read_rows
from benchmarks.suites.planner import LIMIT, QUICK, Case, cases, main, measure


@pytest.mark.parametrize(
    "case", [*QUICK[2::3], *(pytest.param(case, marks=pytest.mark.slow) for case in (*QUICK, *cases()))], ids=str
)
def test_predictions_hold(case: Case) -> None:
    row = measure(case)
    assert 1 <= row["ratio"] <= LIMIT, row


def test_the_committed_table_is_of_every_case_and_holds() -> None:
    rows = read_rows(Path(__file__).parents[2] / "benchmarks" / "results" / "planner.csv")
    known = {(row["model"], row["size"], int(row["batch"]), row["policy"], row["dtype"]) for row in rows}
    assert known >= {(case.model, case.size, case.batch, case.policy, case.dtype) for case in cases()}
    assert len(known) >= 200
    assert all(1 <= float(row["ratio"]) <= LIMIT for row in rows)


def test_the_suite_ends_with_its_range(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.planner.QUICK", QUICK[5:6])
    assert main(["--quick"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["rows"] == 1 and 1 <= document["least"] <= document["most"] <= LIMIT and not document["outside"]
