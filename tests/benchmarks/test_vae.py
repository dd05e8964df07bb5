"""The autoencoder benchmark: its rows say what they measured, its limits can fail."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.suites import vae as bench_vae
from tests.tiling.test_vae import small_vae


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def vae(device: torch.device) -> nn.Module:
        made = small_vae((8, 8, 16, 16))
        made.register_to_config(sample_size=64)  # type: ignore[operator]
        made.tile_sample_min_size, made.tile_latent_min_size = 64, 8  # type: ignore[assignment]
        return made

    monkeypatch.setattr(bench_vae, "sdxl_vae", vae)


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_rows_of_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "vae.csv"
    bench_vae.main(
        [
            "--size",
            "576x640",
            "--repeats",
            "1",
            "--band",
            "32",
            "--defaults-at",
            "96x128",
            "--device",
            "cpu",
            "--csv",
            str(target),
        ]
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["side"], row["way"]): row for row in document["rows"]}
    assert [way for side, way in rows if side == "576x640"] == [
        "untiled", "hires whole", "hires bands", "hires recompute_up", "hires recompute_conv", "hires host",
        "bands, attention over 32 rows", "diffusers tiling",
    ]  # fmt: skip
    exact = rows["576x640", "hires bands"]
    assert exact["psnr_db"] >= 110
    assert exact["max_abs"] <= 1e-4
    assert exact["tracked_mib"] < rows["576x640", "untiled"]["tracked_mib"]
    assert rows["576x640", "hires recompute_conv"]["gflop"] > exact["gflop"]
    assert exact["gflop"] == pytest.approx(rows["576x640", "untiled"]["gflop"], rel=0.02)
    tiles = rows["576x640", "diffusers tiling"]
    assert tiles["psnr_db"] < 80
    assert tiles["gflop"] > exact["gflop"]
    assert rows["576x640", "bands, attention over 32 rows"]["psnr_db"] < 100
    assert rows["96x128", "diffusers tiling"]["against"] == "hires bands"
    assert document["limits"]["576x640 hires bands: PSNR >= 110 dB"] is True
    with target.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])


def test_limits_can_fail() -> None:
    row = {"way": "hires bands", "against": "untiled", "side": "8x8", "psnr_db": 90, "max_abs": 1e-3, "over_first": 1.2}
    assert list(bench_vae.limits([row]).values()) == [False, False, False]


def test_bad_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--size", "100x"], ["--size", "100x100"], ["--repeats", "0"]):
        with pytest.raises(SystemExit) as caught:
            bench_vae.main(options)
        assert caught.value.code == 2
    assert "100x" in capsys.readouterr().err
