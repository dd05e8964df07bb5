"""200 requests with models and devices, and their plans as JSON: what a change of the planner may not change."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.full_size import full_spec
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from hires.devices.machines import described_card
from hires.devices.spec import DeviceSpec
from hires.errors import RequestError, RunError
from hires.options.render import RenderRequest
from hires.options.stage import GuidePlan, StageSpec, WindowSpec
from hires.planning.planner import plan
from hires.tiling.geometry import Size

SNAPSHOT = Path(__file__).parents[1] / "resources" / "plans.json.gz"
COUNT = 200
HOST_BYTES, HOST_CORES, CORE_FLOPS = 20 * 2**30, 2, 25e9  # what text encoders on the host are planned for
FAMILIES = ("demo", "cosxl", "cosxl-edit", "sdxl", "sdxl-turbo", "sd15", "sdxl-lcm", "pixart-sigma-2k", "pixart-sigma-1024")
SIDES = (320, 512, 1000, 1024, 1536, 2048, 3840, 4096, 7680, 8192)
CPU = DeviceSpec(name="cpu", kind="cpu", budget_bytes=2 * 2**30, flops=1e11, bf16=True, most_bytes=16 * 2**30, ram_bytes=0)
DEVICES = (CPU, replace(CPU, budget_bytes=2**29, most_bytes=0), *(described_card(gb * 10**9) for gb in (6, 8, 12, 16, 24, 80)))
OPTIONS: dict[str, tuple[Any, ...]] = {
    "steps": (4, 12, 40),
    "guidance": (1.0, 3.5, 9),
    "sampler": ("euler", "dpmpp_2m", "heun", "dpmpp_2m_sde", "euler_ancestral"),
    "schedule": ("karras", "exponential", "sgm_uniform"),
    "strategy": ("direct", "tiled", "progressive"),
    "dtype": ("fp32", "bf16", "fp16"),
    "tile_px": (256, 640, 1024),
    "overlap_px": (0, 64, 128),
    "sigma_max": ("auto", 60.0),
    "strength": (0.25, 0.8),
    "tiny_vae": ("taesdxl/",),
    "attention_policy": ("npa", "npa:1024", "windows:512", "kvpool:2", "proportional", "global"),
    "allow_approximate": (True,),
    "preset": ("fast", "best"),
    "relay": (
        StageSpec(sigma_start=1.0, steps=8, guides=()),
        StageSpec(enlarger="lanczos", guides=(GuidePlan(kind="pull"),)),
        StageSpec(windows=WindowSpec(tile_px=512, overlap_px=64, blend="gauss", shift=True)),
        StageSpec(guidance=2.0, guidance_interval=(0.3, 10.0), renoise="area"),
    ),
    "colour_fix": ("wavelet", "adain"),
}


def cases() -> Iterator[tuple[RenderRequest, ModelSpec, DeviceSpec]]:
    """The same 200 on every call: a size, a model, a device and up to three options of each."""
    dice = random.Random(20)
    for _ in range(COUNT):
        family = dice.choice(FAMILIES)
        names = dice.sample(list(OPTIONS), dice.choice((0, 0, 1, 1, 2, 3)))
        request = RenderRequest(
            prompt="a sun over a lake",
            size=Size(dice.choice(SIDES), dice.choice(SIDES)),
            seed=dice.randrange(1000),
            **{name: dice.choice(OPTIONS[name]) for name in names},
        )
        yield request, load_spec("demo") if family == "demo" else full_spec(family), dice.choice(DEVICES)


def planned(request: RenderRequest, spec: ModelSpec, device: DeviceSpec) -> dict[str, Any]:
    """The plan as plain JSON values, or the error's class and words, on a host of HOST_CORES and HOST_BYTES."""
    try:
        with (
            mock.patch("hires.devices.machines.available_host_bytes", return_value=HOST_BYTES),
            mock.patch("os.cpu_count", return_value=HOST_CORES),
            mock.patch("hires.devices.machines.core_flops", return_value=CORE_FLOPS),
        ):
            document = plan(request, spec, device).to_json()
    except (RequestError, RunError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    return json.loads(json.dumps(document, default=str))  # type: ignore[no-any-return]


def saved() -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(SNAPSHOT.read_bytes()))  # type: ignore[no-any-return]


if __name__ == "__main__":
    plans = [planned(*case) for case in cases()]
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_bytes(gzip.compress(json.dumps(plans).encode(), mtime=0))
    print(len(plans), sum("error" in made for made in plans))
