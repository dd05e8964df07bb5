"""`--profile` and `--memory-timeline`: a trace that tools read, operators against their floor, memory beside the plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

import hires
from hires.bench.memory_timeline import MemoryTimeline
from hires.bench.profile import Profile, attention_flops, costliest, results
from hires.cli.app import app
from hires.events import Event

SMALL = ["render", "a lake", "--size", "64x64", "--steps", "2", "--quiet"]


def test_the_command_writes_a_trace_and_says_what_costs_most(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*SMALL, "-o", str(tmp_path / "a.png"), "--profile", str(tmp_path / "trace.json")])
    assert done.exit_code == 0, done.output
    trace = json.loads((tmp_path / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::convolution" in names or "aten::conv2d" in names
    lines = done.stderr.splitlines()
    start = next(i for i, line in enumerate(lines) if "costliest operators" in line)
    rows = lines[start + 2 : start + 12]
    assert len(rows) == 10 and sum(row.strip().startswith("aten::") for row in rows) >= 8
    assert "x floor" in lines[start + 1]
    assert (tmp_path / "a.png").exists()


def test_only_the_first_steps_of_a_stage_are_recorded(tmp_path: Path) -> None:
    heard: list[Event] = []
    with Profile(tmp_path / "trace.json", heard.append) as profile:
        states = []
        for step in range(6):
            profile.hear(Event(stage="base", done=step, total=6, step=step, steps=6))
            states.append(profile._recording)
        profile.hear(Event(stage="decode", done=1, total=20))
        states.append(profile._recording)
        torch.ones(4) + 1
    assert states == [True, True, False, False, False, False, True] and len(heard) == 7


def test_floors_of_operators() -> None:
    from torch.profiler import ProfilerActivity, profile

    a, b = torch.randn(256, 384), torch.randn(384, 192)
    q, x, weight = torch.randn(1, 4, 512, 64), torch.randn(2, 24, 20, 28), torch.randn(16, 24, 3, 3)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as found, torch.inference_mode():
        for _ in range(3):
            a @ b
            F.scaled_dot_product_attention(q, q, q)
            F.conv2d(x, weight, padding=1)
    rows = costliest(found.key_averages(group_by_input_shape=True), torch.device("cpu"), torch.float32)
    from hires.bench.timing import peak_bandwidth, peak_flops

    product = next(row for row in rows if row.name == "aten::mm")
    peaks = peak_flops(torch.device("cpu"), torch.float32), peak_bandwidth(torch.device("cpu"))

    def floor(flops: float, values: int) -> float:
        return 3 * max(flops / peaks[0], 4 * values / peaks[1])

    assert product.calls == 3
    assert product.floor_seconds == pytest.approx(floor(2.0 * 256 * 384 * 192, 256 * 384 + 384 * 192 + 256 * 192))
    kernel = next(row for row in rows if "conv" in row.name and row.floor_seconds)
    pixels = 2 * 20 * 28
    assert kernel.name not in ("aten::conv2d", "aten::convolution") and kernel.calls == 3
    least = floor(2.0 * 9 * 24 * 16 * pixels, 24 * pixels + weight.numel() + 16 * pixels)
    assert kernel.floor_seconds == pytest.approx(least, rel=1e-6)
    assert results(2.0 * 9 * 24 * 16 * pixels, [tuple(x.shape), tuple(weight.shape)]) == 16 * pixels
    assert (
        attention_flops("aten::_scaled_dot_product_flash_attention_for_cpu", [(1, 4, 512, 64)] * 3) == 4.0 * 4 * 512 * 512 * 64
    )
    assert attention_flops("aten::add", [(1, 4, 512, 64)] * 2) == 0


def test_the_timeline_shows_planned_beside_measured(tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    done = CliRunner().invoke(app, [*SMALL, "-o", str(tmp_path / "a.png"), "--memory-timeline", str(picture)])
    assert done.exit_code == 0, done.output
    assert Image.open(picture).size[0] > 800
    lines = [line for line in done.stderr.splitlines() if "planned" in line]
    plan = hires.plan(size="320x192", steps=3)
    assert [line.split("planned")[0].strip() for line in lines] == [cost.stage for cost in plan.costs if cost.stage != "text"]


def test_a_stage_begins_where_the_one_before_was_last_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = MemoryTimeline(tmp_path / "a.svg")
    clock = iter([1.0, 2.0, 5.0, 9.0])
    monkeypatch.setattr("hires.bench.profile.time.monotonic", lambda: timeline._begun + next(clock))
    for stage, done in (("load", 1), ("base", 0), ("base", 4), ("decode", 1)):
        timeline.hear(Event(stage=stage, done=done, total=4))
    plan = hires.plan(size="128x128", steps=2)
    assert [(begin, end, stage) for begin, end, stage, _ in timeline.spans(plan)] == [(1.0, 5.0, "base"), (5.0, 9.0, "decode")]
    timeline.samples = [(0.5, 100), (1.0, 200), (3.0, 900)]
    assert timeline.base_bytes(plan) == 200
    assert "a.svg" in timeline.draw(plan) and (tmp_path / "a.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--profile", "a.txt"], ".json"),
        (["--profile", "no/such/a.json"], "does not exist"),
        (["--memory-timeline", "a.gif"], ".png"),
        (["--memory-timeline", "no/such/a.png"], "does not exist"),
        (["--memory-timeline", "a.png", "--profile", "a.json"], "one at a time"),
    ],
)
def test_wrong_names_are_said_before_any_work(
    tmp_path: Path, options: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*SMALL, "-o", "a.png", *options])
    assert done.exit_code == 2 and reason in done.stderr and not list(tmp_path.iterdir())
