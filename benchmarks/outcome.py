"""What a strategy's picture is measured by, on the oracle and on scenes: the same five numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo.scenes import Scene
from benchmarks.disks import find_disks, local_band_energy, lopsided_disks, quiet_energy, third_of
from benchmarks.oracle import Oracle, find_objects, prior_of
from benchmarks.suites.scenes import ground_truth
from hires.images.boxes import luma
from hires.images.whole import to_uint8
from hires.metrics import fidelity
from hires.metrics.seams import seam_lines, seam_ratio, seam_score
from hires.refine.low_pass import area_axis
from hires.tiling.geometry import Size, TileGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one picture.

    duplicates: objects beyond the one that the picture is of; kept: whether that one is there. seam_ratio: the mean gradient
    across tile edges over that elsewhere, seam_score the house's measure, both 1 without seams. drift: the RMS by which the
    picture, averaged down, differs from the base picture, over that one's deviation. detail: energy beyond the base picture's
    Nyquist frequency over that of the truth: the prior's, or the scene drawn at this size.
    """

    duplicates: int
    kept: bool
    seam_ratio: float
    seam_score: float
    drift: float
    detail: float


def on_oracle(latents: Tensor, first: Tensor, grid: TileGrid, oracle: Oracle) -> Outcome:
    """Of latents (1, 1, h, w) whose base is `first`. On a large canvas every native-size object is a duplicate: the picture's
    own is as much larger as the canvas is."""
    picture, small = latents[0, 0].double(), averaged(latents[0, 0], first.shape[-2:])
    of_base, found = find_objects(first[0, 0], oracle), find_objects(small, oracle)
    enlarged = latents.shape != first.shape
    duplicates = len(find_objects(picture, oracle)) if enlarged else max(0, len(found) - 1)
    cutoff = first.shape[-1] / (2 * picture.shape[-1]) if enlarged else 0.25
    pixels = picture.numpy().astype(np.float32)
    rows, cols = seam_lines(grid, 1)
    return Outcome(
        duplicates=duplicates,
        kept=len(found) >= len(of_base),
        seam_ratio=seam_ratio(pixels, rows, cols),
        seam_score=seam_score(pixels, rows, cols),
        drift=drift(small, first[0, 0]),
        detail=quiet_energy(pixels, cutoff) / prior_energy(oracle, picture, cutoff),
    )


def on_scene(picture: Tensor, first: Tensor, grid: TileGrid, scene: Scene) -> Outcome:
    """Of pixels (3, H, W) in [-1, 1] whose base picture is `first`."""
    pixels, base = (to_uint8(p.permute(1, 2, 0).numpy()) for p in (picture, first))
    light, base_light = luma(pixels), luma(base)
    disks = find_disks(pixels)
    lopsided = lopsided_disks(pixels, disks)
    truth = ground_truth(scene, pixels.shape[0])
    cutoff = base.shape[0] / (2 * pixels.shape[0]) if pixels.shape != base.shape else 0.25
    away = [*disks, *lopsided, *find_disks(truth)]
    rows, cols = seam_lines(grid, pixels.shape[0] // grid.canvas.height)
    return Outcome(
        duplicates=max(0, len(disks) + len(lopsided) - 1),
        kept=any(third_of(disk.x) == scene.third for disk in disks),
        seam_ratio=seam_ratio(light, rows, cols),
        seam_score=seam_score(light, rows, cols),
        drift=drift(averaged(torch.from_numpy(light), base_light.shape), torch.from_numpy(base_light)),
        detail=local_band_energy(light, cutoff, away) / local_band_energy(luma(truth), cutoff, away),
    )


def averaged(picture: Tensor, size: Sequence[int]) -> Tensor:
    """A picture (h, w) as means over equal parts, float64."""
    rows, cols = (torch.from_numpy(area_axis(n, few)) for n, few in zip(picture.shape, size, strict=True))
    small: Tensor = rows @ picture.double() @ cols.T
    return small


def drift(small: Tensor, first: Tensor) -> float:
    """`metrics.drift` of tensors."""
    return fidelity.drift(small.numpy(), first.numpy())


def prior_energy(oracle: Oracle, picture: Tensor, cutoff: float) -> float:
    """Mean square of the prior's field at or above `cutoff` cycles per cell, on the picture's canvas."""
    prior = prior_of(oracle, Size(picture.shape[-2], picture.shape[-1]))
    radius = np.hypot(np.fft.fftfreq(picture.shape[-2])[:, None], np.fft.rfftfreq(picture.shape[-1])[None, :])
    return float((prior.spectrum * prior.halves)[torch.from_numpy(radius >= cutoff)].sum() / prior.size.area)
