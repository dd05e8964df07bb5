"""The kernels' benchmarks at toy sizes: every backend has a row with a number or its reason, JSON comes last."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_blend, bench_group_norm
from benchmarks.timing import quantile, timed
from hires.kernels.backends import BackendRefused


@pytest.mark.parametrize("suite", [bench_group_norm, bench_blend], ids=["group_norm", "blend"])
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


def test_out_of_memory_and_refusals_are_values_and_other_errors_are_not() -> None:
    import torch

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
