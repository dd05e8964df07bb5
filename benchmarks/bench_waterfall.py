"""One optimisation at a time, from a naive relay to ours: seconds, memory and quality of one picture of the shipped model.

    python -m benchmarks waterfall                    # 2048 px, about ten minutes on two cores
    python -m benchmarks waterfall --quick            # 512 px, no rows

Every step keeps those before it. Each runs in a process of its own; a row has the seconds of stages, decode and file, the peak
resident memory, PSNR against the last step's picture, and the energy above the base picture's Nyquist over the last's.
Rows that are there for the same code are kept. Rows go to results/waterfall.csv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import hires
from benchmarks.children import in_child
from benchmarks.common import RESULTS, append_row, digest, read_rows, stamp

PROMPT, SEED = "a sun on the right over green mountains and a lake at dusk", 0
STEPS = (
    "naive: half overlaps, guidance in every stage, one tile a batch, all scores held, one thread",
    "a quarter of overlap",
    "no guidance where the prompt is drawn already",
    "fused attention",
    "channels last",
    "tiles in batches",
    "both threads",
    "decoded in bands into the file",
)
BUDGET = "2GB"


def settings() -> str:
    """Changes with the code and the weights."""
    package = Path(hires.__file__).parent
    return digest([*package.rglob("*.py"), *package.glob("assets/demo/**/*.*"), Path(__file__)])


def render(step: int, side: int, folder: Path) -> dict[str, Any]:
    """One picture with the first `step` optimisations; what it took."""
    import torch

    from hires.device import peak_resident_bytes
    from hires.tiling.retry import Batcher

    with ExitStack() as stack:
        relay = []
        if step < 1:
            relay += ["tile=256", "overlap=128"]
        if step < 2:
            relay += ["guidance=2"]
        if step < 4:
            stack.enter_context(mock.patch("hires.pipelines.cosxl.convolutions_last", lambda module, device: module))
            stack.enter_context(mock.patch("hires.pipelines.base.convolutions_last", lambda module, device: module))
            stack.enter_context(mock.patch("hires.unet.UNetNetwork.__call__", plain_layout))
            stack.enter_context(mock.patch("hires.pipelines.base.LoadedFamily.laid_out", lambda self, x: x))
        if step < 5:
            stack.enter_context(
                mock.patch("hires.pipelines.progressive.Batcher", lambda batch, relief=None: Batcher(1, relief))
            )
        if step < 6:
            torch.set_num_threads(1)
        options: dict[str, Any] = {"size": (side, side), "seed": SEED, "relay": ",".join(relay) or None, "device": "cpu"}
        if step < 3:
            options["attention"] = "math"
        output = folder / "a.png"
        hires.render(PROMPT, size="64x64", steps=1, vram=BUDGET)  # imports, weights in the page cache
        begun = time.perf_counter()
        if step < 7:  # whole in memory, then saved at once
            result = hires.render(PROMPT, vram="16GB", **options)
            from PIL import Image

            Image.fromarray(result.pixels).save(output)
        else:
            result = hires.render(PROMPT, vram=BUDGET, output=output, journal=None, **options)
        seconds = time.perf_counter() - begun
    np.save(folder / "pixels.npy", result.pixels)
    stages = {stats.stage: round(stats.seconds, 2) for stats in result.stats}
    return {
        "state": "ran",
        "seconds": round(seconds, 2),
        "stages": ", ".join(f"{name} {taken}" for name, taken in stages.items()),
        "decode": result.plan.decode.policy,
        "peak_rss_mib": round(peak_resident_bytes() / 2**20, 1),
        "tflop": round(result.plan.flops / 1e12, 3),
    }


def plain_layout(self: Any, x: Any, time: float, cond: Any) -> Any:
    """The UNet without its channels-last input."""
    import torch

    if cond.image_latents is not None:
        x = torch.cat([x, cond.image_latents.to(x)], dim=1)
    return self.unet(
        x.to(self.dtype).contiguous(), torch.full((x.shape[0],), time, device=x.device), encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.mask, added_cond_kwargs=self._added(cond), return_dict=False,
        cross_attention_kwargs={"canvas": (x.shape[-2], x.shape[-1]), "policy": self._policy(time)},
    )[0]  # fmt: skip


def quality(folder: Path, last: Path, side: int) -> dict[str, float]:
    """A picture against the last step's: PSNR, and how much detail it has of that one's."""
    from hires.metrics import band_energy, luma, psnr

    pictures = [np.load(where / "pixels.npy") for where in (folder, last)]
    energies = [band_energy(luma(picture.astype(np.float32) / 255), 128 / side) for picture in pictures]
    same = psnr(pictures[0].astype(np.float32), pictures[1].astype(np.float32), 255.0)
    return {"psnr_db": round(min(same, 999.0), 2), "detail": round(energies[0] / energies[1], 3)}


def rows_of(side: int, wanted: list[int], root: Path) -> list[dict[str, Any]]:
    """The rows of some steps; the last step is run where its picture is not there."""
    found: dict[int, dict[str, Any]] = {}
    for step in [*wanted, len(STEPS) - 1]:
        folder = root / str(step)
        if step in found:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        found[step] = in_child("waterfall", str(step), str(side), str(folder), timeout=1200)
        print(f"{step} {STEPS[step]}: {found[step]}", flush=True)
    last = root / str(len(STEPS) - 1)
    return [
        {"step": step, "name": STEPS[step], "side": side}
        | row
        | (quality(root / str(step), last, side) if row["state"] == "ran" else {})
        for step, row in sorted(found.items())
    ]


def speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the speed-up of each step over the one before, and over the first."""
    made = []
    for before, row in zip([rows[0], *rows], rows, strict=False):
        ran = all(one["state"] == "ran" for one in (before, row, rows[0]))
        over = {
            "over_before": round(before["seconds"] / row["seconds"], 3),
            "over_naive": round(rows[0]["seconds"] / row["seconds"], 3),
        }
        made.append(row | (over if ran else {"over_before": "", "over_naive": ""}))
    return made


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--child"]:
        print(json.dumps(render(int(arguments[1]), int(arguments[2]), Path(arguments[3]))))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks waterfall", description=__doc__)
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--quick", action="store_true", help="512 px, the first and the last step, no rows")
    parser.add_argument("--csv", action="store_true", help="append rows to results/waterfall.csv")
    options = parser.parse_args(arguments)
    side = 512 if options.quick else options.side
    path, state = RESULTS / "waterfall.csv", settings()
    if any(row["settings"] == state and row["side"] == str(side) for row in read_rows(path)) and options.csv:
        print(json.dumps({"rows": "are there for this code"}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = speeds(rows_of(side, [0] if options.quick else list(range(len(STEPS))), Path(folder)))
    if options.csv:
        for row in rows:
            append_row(path, stamp() | {"settings": state} | row)
    print(json.dumps({"rows": rows}))
    return int(any(row["state"] != "ran" for row in rows))
