"""`--ram` bounds the resident memory of the whole process."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hires.checkpoints.model import ModelSpec
from hires.devices.machines import described_card, host_device
from hires.errors import BudgetError
from hires.options.render import RenderRequest
from hires.planning.planner import plan
from hires.tiling.geometry import Size
from hires.units import parse_bytes


def render(size: str, ram: str, output: Path) -> dict[str, Any]:
    """In a process of its own, whose peak it is. Steps do not change the peak: few."""
    command = [sys.executable, "-m", "hires", "render", "a sun over a lake", "--size", size, "--ram", ram, "--steps", "2",
               "-o", str(output), "--json", "--quiet"]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize(
    ("size", "ram"),
    [pytest.param("1024x1024", "1GB", marks=pytest.mark.slow), pytest.param("4096x4096", "3GB", marks=pytest.mark.slow)],
)
def test_a_render_stays_below_its_ram(size: str, ram: str, tmp_path: Path) -> None:
    document = render(size, ram, tmp_path / "a.png")
    print(size, ram, document["peak_rss_bytes"] / 1e9, "GB")
    assert document["peak_rss_bytes"] <= parse_bytes(ram)


def test_less_ram_takes_a_smaller_decode_and_too_little_is_refused(demo: ModelSpec) -> None:
    request = RenderRequest(prompt="", size=Size(4096, 4096))
    wide, narrow = (plan(request, demo, host_device(parse_bytes("4GiB"), parse_bytes(ram))) for ram in ("16GB", "3GB"))
    assert narrow.peak_bytes < wide.peak_bytes and narrow.decode != wide.decode
    with pytest.raises(BudgetError, match=r"of host memory, `ram` allows 762\.9 MiB: `ram` \d\.\dGB would do") as caught:
        plan(request, demo, host_device(None, parse_bytes("800MB")))
    named = str(caught.value).split("`ram` ")[-1].split(" ")[0]
    plan(request, demo, host_device(None, parse_bytes(named)))


def test_a_card_whose_host_is_small_keeps_weights_and_maps_off_it(demo: ModelSpec) -> None:
    request = RenderRequest(prompt="", size=Size(8192, 8192))
    card, large = parse_bytes("2GB"), parse_bytes("64GB")
    assert plan(request, demo, described_card(card, large)).decode.policy == "host"
    with pytest.raises(BudgetError, match="would do"):
        plan(request, demo, described_card(card, parse_bytes("2GB")))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what becomes of freed memory")
def test_freed_memory_is_kept_within_and_leaves_the_process_after() -> None:
    """In a process of its own, whose page faults and resident memory it is.

    The process imports what a render imports: in a barer one glibc 2.36 puts what `memalign` cuts off a block into its
    still empty thread cache (seven entries of a size), and each piece there keeps the block beside it from being used again.
    """
    script = """
import json, pathlib, resource
import torch
import hires.engine.run
from hires.devices.memory import freed_pages

def faults(way):
    with freed_pages(way):
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(16):
            torch.empty(2**26, dtype=torch.uint8).fill_(1)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return after - before

def resident():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024

begun = resident()
print(json.dumps({"usual": faults("usual"), "kept": faults("kept"), "grown": resident() - begun}))
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["kept"] < 0.2 * found["usual"]
    assert found["grown"] < 32
