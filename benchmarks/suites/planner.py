"""`python -m benchmarks planner`: predicted against allocated bytes of the full-size networks, on fake tensors.

The models are built at their true size with no memory behind them, run once, and every storage that an operator makes is
counted. A row holds both numbers; the law is that the prediction is never below and at most a tenth above.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.allocations import counted
from benchmarks.common import RESULTS, append_row, stamp
from hires._imports import quiet_imports
from hires.checkpoints.configs import shipped_config
from hires.checkpoints.families import FAMILIES, NetworkShape, PixArtShape, UNetShape
from hires.checkpoints.spec import unet_shape
from hires.kernels.attention_policies import EVERYWHERE, NPA, KVPool, Policy, Windows
from hires.models.attention_processors import dispatch_attention
from hires.models.pixart import PixArtNetwork
from hires.models.unet import UNetNetwork
from hires.planning.costs.network_memory import network_live_bytes, text_live_bytes
from hires.planning.plan import DecodePlan
from hires.sampling.conditioning import Conditioning
from hires.tiling import vae as banded
from hires.tiling.bands.memory import VaeShape
from hires.tiling.bands.storage import VaeTask, vae_policy
from hires.tiling.geometry import Box, Size

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PIXART = PixArtShape(layers=28, heads=16, head_dim=72, patch=2, caption_width=4096, latent_channels=4)
VAE = VaeShape(channels=(128, 256, 512, 512), resnets=2, latent_channels=4, mid_attention=True)
SIZES = ("512x512", "1024x1024", "1344x768", "832x1216", "2048x2048", "3840x2160", "1088x4160", "4096x4096", "7680x4320")
LIMIT = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: model 'cosxl', 'sd15', 'pixart', 't5', 'vae decode' or 'vae encode'; `policy` of attention, or of the VAE."""

    model: str
    size: str
    batch: int
    policy: str
    dtype: str

    @property
    def cells(self) -> Size:
        width, height = (int(side) for side in self.size.split("x"))
        return Size(height // 8, width // 8)


POLICIES: dict[str, Policy] = {
    "global": EVERYWHERE, "npa:1024": NPA(128), "npa:2048": NPA(256), "windows:512": Windows(64), "kvpool:2": KVPool(2),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every combination that a plan may choose at its size; 8K only in one picture at a time."""
    for model in ("cosxl", "pixart"):
        for size in (*SIZES, "8192x8192"):
            for policy in POLICIES:
                for batch, dtype in ((1, "bf16"), (2, "bf16"), (2, "fp32"), (4, "bf16")):
                    if batch == 1 or (policy in ("global", "npa:1024") and int(size.split("x")[0]) <= 4096):
                        yield Case(model=model, size=size, batch=batch, policy=policy, dtype=dtype)
    for size in ("512x512", "768x1024", "1920x1080"):
        for batch in (1, 2):
            yield Case(model="sd15", size=size, batch=batch, policy="global", dtype="bf16")
    for dtype in DTYPES:
        for batch in (1, 2):
            for tokens in ("77", "120", "300"):
                yield Case(model="t5", size=tokens, batch=batch, policy="global", dtype=dtype)
    for model in ("vae decode", "vae encode"):
        for size in ("512x512", "1344x768", "2048x2048", "3840x2160", "4096x4096", "8192x8192"):
            for policy in ("whole", "bands", "recompute_up", "recompute_conv", "host"):
                for dtype in DTYPES:
                    if policy != "whole" or size not in ("4096x4096", "8192x8192"):
                        yield Case(model=model, size=size, batch=1, policy=policy, dtype=dtype)


QUICK = (
    Case(model="cosxl", size="1344x768", batch=2, policy="global", dtype="bf16"),
    Case(model="cosxl", size="1440x1104", batch=1, policy="npa:1024", dtype="fp32"),
    Case(model="pixart", size="1440x1104", batch=2, policy="npa:1024", dtype="bf16"),
    Case(model="pixart", size="1024x1024", batch=1, policy="kvpool:2", dtype="fp32"),
    Case(model="sd15", size="768x512", batch=2, policy="global", dtype="bf16"),
    Case(model="t5", size="300", batch=2, policy="global", dtype="bf16"),
    Case(model="vae decode", size="1344x768", batch=1, policy="whole", dtype="bf16"),
    Case(model="vae encode", size="1344x768", batch=1, policy="recompute_up", dtype="bf16"),
)


def measure(case: Case) -> dict[str, Any]:
    """Predicted and allocated bytes of a case, and their ratio."""
    begun, element = time.perf_counter(), DTYPES[case.dtype].itemsize
    if case.model == "t5":
        predicted, tracked = text_live_bytes(("t5",), case.batch, int(case.size), element), _t5(case)
    elif case.model.startswith("vae"):
        encode = case.model == "vae encode"
        rows = 0 if case.policy == "whole" else 64
        task = VaeTask(shape=VAE, cells=case.cells, element=element, encode=encode)
        predicted = vae_policy(task, case.policy, rows).peak_bytes
        tracked = vae_bytes(case.cells, case.policy, rows, case.dtype, encode)
    else:
        shape, words = network_shape(case.model), 300 if case.model == "pixart" else 77
        policy = POLICIES[case.policy]
        predicted = network_live_bytes(shape, case.cells, case.batch, element, cpu=False, tokens=words, policy=policy)
        tracked = network_bytes(case.model, case.cells, case.batch, policy, case.dtype)
    return {
        "model": case.model, "size": case.size, "batch": case.batch, "policy": case.policy, "dtype": case.dtype,
        "predicted_mib": round(predicted / 2**20, 2), "allocated_mib": round(tracked / 2**20, 2),
        "ratio": round(predicted / tracked, 4), "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def network_shape(model: str) -> NetworkShape:
    if model == "pixart":
        return PIXART
    family = {"cosxl": "sdxl", "sd15": "sd15"}[model]
    shape: UNetShape = unet_shape(json.loads(shipped_config(family, "unet").read_text()), FAMILIES[model])
    return shape


def _built(make: Callable[[], Any], dtype: str) -> Any:
    """A module in a type, made in it."""
    torch.set_default_dtype(DTYPES[dtype])
    try:
        return make().eval()
    finally:
        torch.set_default_dtype(torch.float32)


def network_bytes(model: str, cells: Size, batch: int, policy: Policy, dtype: str, layers: int = 2) -> int:
    """One evaluation of `batch` pictures, from float32 latents. Blocks are alike: `layers` of PixArt's hold what 28 do."""
    with quiet_imports():
        from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
    shape, words, kind = network_shape(model), 300 if model == "pixart" else 77, DTYPES[dtype]
    network: Any
    with counted() as found:
        if isinstance(shape, UNetShape):
            config = json.loads(shipped_config("sdxl" if model == "cosxl" else model, "unet").read_text())
            unet = _built(lambda: UNet2DConditionModel.from_config(config), dtype)
            network = UNetNetwork(dispatch_attention(unet, "sdpa"), kind)
        else:
            options = {"caption_channels": 4096, "sample_size": 128, "use_additional_conditions": False}
            transformer = _built(lambda: PixArtTransformer2DModel(num_layers=layers, **options), dtype)
            network = PixArtNetwork(transformer, span=32.0, backend="sdpa")
        found.live = found.peak = 0
        width = shape.context_width if isinstance(shape, UNetShape) else shape.caption_width
        cond = Conditioning(
            tokens=torch.empty(batch, words, width, dtype=kind), canvas=cells,
            mask=None if isinstance(shape, UNetShape) else torch.empty(batch, words).bool(),
            pooled=torch.empty(batch, 1280, dtype=kind) if model == "cosxl" else None,
            size_ids=torch.empty(batch, 6, dtype=kind) if model == "cosxl" else None,
        )  # fmt: skip
        network.attending(lambda time: policy)(torch.empty(batch, 4, cells.height, cells.width), 500.0, cond)
    return found.peak


def _t5(case: Case) -> int:
    """T5-XXL's encoder at its true widths; two of its layers hold what 24 do."""
    with quiet_imports():
        from transformers import T5Config, T5EncoderModel
    config = json.loads(shipped_config("pixart", "text_encoder").read_text()) | {"num_layers": 2}
    with counted() as found:
        tower = _built(lambda: T5EncoderModel(T5Config(**config)), case.dtype)
        found.live = found.peak = 0
        ids = torch.empty(case.batch, int(case.size), dtype=torch.long)
        tower(ids, attention_mask=torch.empty_like(ids))
    return found.peak


@dataclass(frozen=True, slots=True)
class FakePicture:
    """Pixels of a size that come as they are asked for."""

    size: Size
    dtype: torch.dtype

    def crop(self, part: Box) -> Tensor:
        return torch.empty(1, 3, part.height, part.width, dtype=self.dtype)


def vae_bytes(cells: Size, policy: str, band_rows: int, dtype: str, encode: bool) -> int:
    """One decode or encode of the SDXL autoencoder."""
    with quiet_imports():
        from diffusers import AutoencoderKL
    levels, kind = len(VAE.channels), DTYPES[dtype]
    plan = DecodePlan(policy=policy, band_rows=band_rows, dtype=dtype)
    with counted() as found:
        vae = _built(
            lambda: AutoencoderKL(
                block_out_channels=VAE.channels, down_block_types=("DownEncoderBlock2D",) * levels, norm_num_groups=32,
                up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=2, latent_channels=4,
            ),
            dtype,
        )  # fmt: skip
        found.live = found.peak = 0
        with mock.patch("hires.tiling.bands.transfer.to_host", found.move_to_host):
            if encode:
                banded.Run(vae).encode(FakePicture(cells.times(8), kind), plan)
            else:
                z = torch.empty(1, 4, cells.height, cells.width, dtype=kind)
                found.live = found.peak = 0
                for rows in banded.Run(vae).decode(z, plan):
                    del rows
    return found.peak


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks planner", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small cases of every model, no rows")
    parser.add_argument("--csv", action="store_true", help="append rows to benchmarks/results/planner.csv; resumes there")
    options = parser.parse_args(arguments)
    path, rows = RESULTS / "planner.csv", []
    done = _done(path) if options.csv else set()
    for case in QUICK if options.quick else cases():
        if (case.model, case.size, str(case.batch), case.policy, case.dtype) in done:
            continue
        row = measure(case)
        rows.append(row)
        print(f"{case.model:<11}{case.size:>10} x{case.batch} {case.policy:<15}{case.dtype:<5}"
              f"{row['predicted_mib']:>11.1f} MiB predicted, {row['ratio']:.4f} of allocated")  # fmt: skip
        if options.csv:
            append_row(path, stamp() | row)
    ratios = [row["ratio"] for row in rows]
    wrong = [row for row in rows if not 1 <= row["ratio"] <= LIMIT]
    summary = {"rows": len(rows), "least": min(ratios, default=None), "most": max(ratios, default=None), "outside": wrong}
    print(json.dumps(summary))
    return 1 if wrong else 0


def _done(path: Any) -> set[tuple[str, ...]]:
    from benchmarks.common import read_rows

    return {tuple(row[name] for name in ("model", "size", "batch", "policy", "dtype")) for row in read_rows(path)}
