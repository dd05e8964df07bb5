"""The kernels' benchmarks at toy sizes: every backend has a row with a number or its reason, JSON comes last."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.suites import attention, blend, group_norm
from hires.bench.timing import quantile, timed
from hires.kernels.attention_policies import NPA
from hires.kernels.backends import BackendRefused
from hires.kernels.dispatch import BACKENDS


@pytest.mark.parametrize("suite", [group_norm, blend], ids=["group_norm", "blend"])
def test_rows_of_every_backend(suite: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--quick"]) == 0  # type: ignore[attr-defined]
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["backend"] for row in document["rows"]} == {"triton", "torch"}
    for row in document["rows"]:
        if row["state"] == "ran":
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["rms_error"] < 1e-3 and row["gb_per_s"] > 0
        else:
            assert row["state"].startswith("refused: ") and row["p50_ms"] is None
    assert any(row["state"] == "ran" for row in document["rows"])


def test_attention_rows_of_every_model_policy_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(["--quick"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["backend"] for row in rows} == {backend.name for backend in BACKENDS}
    assert {row["model"] for row in rows} == {"cosxl", "pixart", "vae"}
    assert {row["policy"].split(":")[0] for row in rows} >= {"global", "kvpool"}
    ran = [row for row in rows if row["state"] == "ran"]
    assert all(row["rms_error"] < 2e-6 and row["tflop_per_s"] > 0 for row in ran)
    assert all(row["state"].startswith("refused: ") for row in rows if row not in ran) and len(ran) > len(rows) // 3


def test_the_sampled_rows_are_those_of_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """Windows on a canvas that is larger than they are: what the definition names is what runs."""
    call = attention.Call(model="x", layer="x", heads=2, head_dim=8, canvas=(20, 24), policy=NPA(8))
    parts = attention.tensors(call, torch.float64, torch.device("cpu"))
    picked = [0, 5, 100, 479]
    exact = attention.exact_rows(call, parts, picked)
    row = attention.measure(call, "sdpa", parts, exact, picked, 10.0, seconds=0.1)
    assert row["rms_error"] < 1e-12  # type: ignore[operator]
    assert attention.measure(call, "sdpa", parts, exact, picked, 0.0)["state"].startswith("skipped: about")  # type: ignore[attr-defined]


def test_out_of_memory_and_refusals_are_values_and_other_errors_are_not() -> None:
    def scarce() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def refused() -> None:
        raise BackendRefused("no card")

    def wrong() -> None:
        raise ValueError("wrong")

    cpu = torch.device("cpu")
    assert timed(scarce, cpu).state == "out of memory"
    assert timed(refused, cpu).state == "refused: no card"
    with pytest.raises(ValueError, match="wrong"):
        timed(wrong, cpu)
    ran = timed(lambda: None, cpu, least=4, most=4)
    assert ran.repeats == 4 and ran.p50 is not None
    assert quantile([3.0, 1.0, 2.0, 5.0], 0.5) == 2.5
