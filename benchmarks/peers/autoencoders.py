"""Decoding: the exact autoencoder beside diffusers' own ways, and TAESD beside itself in bands."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.peers import Way, version_of
from benchmarks.rows import AbsentError
from benchmarks.suites.io import DATA

OURS = "hires, bands"
WAYS = (OURS, "hires, least memory", "diffusers, whole", "diffusers enable_tiling")
PAIRS = ("hires, two pictures", "diffusers, two pictures", "diffusers enable_slicing, two pictures")
TINY = ("TAESDXL, whole", "TAESDXL, hires bands")


def sdxl_vae(quick: bool) -> Any:
    """The SDXL autoencoder with random weights; a narrow one with small tiles where only the code is tried."""
    if not quick:
        from benchmarks.suites.vae import sdxl_vae as full

        return full(torch.device("cpu"))
    from benchmarks.suites.scaling import narrow_vae

    vae = narrow_vae()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 128, 16
    return vae


def decoder(name: str, side: int, quick: bool) -> Way:
    """A way to decode latents of a square picture, two of them where its name says so."""
    if name.startswith("TAESDXL"):
        return tiny(name, side)
    vae, pictures = sdxl_vae(quick), 2 if "two" in name else 1
    z = torch.randn(pictures, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    small = z[..., : side // 16, : side // 16].contiguous()
    like = PAIRS[0] if pictures == 2 else OURS
    if name.startswith("hires"):
        from hires.tiling.geometry import bands
        from hires.tiling.vae import TiledVAE

        policy = "recompute_conv" if "least" in name else "bands"
        tiled = TiledVAE(vae, policy=policy)
        plan = tiled.plan(side // 8, side // 8)[0]
        facts = {"version": version_of("hires"), "gflop": round(pictures * plan.flops / 1e9, 1)}
        lines = tuple(top for top, _ in bands(side, plan.band_rows))[1:]
        return Way(run=partial(tiled.decode, z), warm_up=partial(tiled.decode, small), facts=facts, rows=lines, like=like,
                   repeats=repeats_of(side))  # fmt: skip
    if "tiling" in name:
        vae.enable_tiling()
    if "slicing" in name:
        vae.enable_slicing()
    stride = int(vae.tile_sample_min_size * (1 - vae.tile_overlap_factor))
    tiled_now = "tiling" in name and side // 8 > vae.tile_latent_min_size
    note = "" if tiled_now or "tiling" not in name else f"not tiled up to {vae.tile_sample_min_size} px"
    lines = tuple(range(stride, side, stride)) if tiled_now else ()
    return Way(run=partial(decoded, vae, z), warm_up=partial(decoded, vae, small), rows=lines, cols=lines, like=like,
               facts={"version": version_of("diffusers"), "note": note}, repeats=repeats_of(side))  # fmt: skip


def repeats_of(side: int) -> int:
    return 3 if side <= 1024 else 1


def decoded(vae: Any, z: Tensor) -> Tensor:
    picture: Tensor = vae.decode(z).sample
    return picture


def tiny(name: str, side: int) -> Way:
    """TAESDXL with its real weights: it decodes another picture than SDXL's autoencoder, so it is held against itself."""
    from hires._imports import quiet_imports
    from hires.tiling.geometry import bands
    from hires.tiling.halo import HaloVAE

    if not (DATA / "taesdxl").is_dir():
        raise AbsentError("the test data is absent")
    with quiet_imports():
        from diffusers import AutoencoderTiny
    vae: nn.Module = AutoencoderTiny.from_pretrained(DATA / "taesdxl").eval().requires_grad_(False)
    z = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    note = f"a smaller autoencoder: a photograph's round trip {round_trip(vae):.1f} dB"
    facts = {"version": version_of("diffusers"), "note": note}
    if "hires" not in name:
        return Way(run=partial(decoded, vae, z), facts=facts, like=TINY[0])
    tiled = HaloVAE(vae, band_px=256)
    rows = tuple(top for top, _ in bands(side, 256))[1:]
    return Way(run=partial(tiled.decode, z), facts=facts | {"version": version_of("hires")}, rows=rows, like=TINY[0])


def round_trip(vae: Any) -> float:
    """PSNR of a photograph encoded and decoded: what its approximation of the autoencoder costs."""
    from hires.metrics.fidelity import psnr

    with Image.open(DATA / "photos" / "kodim23.png") as opened:
        pixels = np.asarray(opened.convert("RGB"))
    given = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        found = vae.decode(vae.encode(given).latents).sample.clamp(-1, 1)
    return psnr(found.numpy(), given.numpy(), 2.0)
