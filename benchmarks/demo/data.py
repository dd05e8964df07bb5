"""What the demo model is trained on: crops, whole pictures and captions of scenes that are not held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.demo.held_out import FIRST_SEED, held_out_kinds
from benchmarks.demo.model import NATIVE_CELLS
from benchmarks.demo.scenes import HORIZON, Scene, draw, scene
from hires.tiling.geometry import Box, Size

View = Callable[[np.random.Generator], tuple[Scene, Size, Box]]


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene that is not held out; redrawn until its kind is allowed, then asserted."""
    while True:
        drawn = scene(int(rng.integers(FIRST_SEED)))
        if drawn.kind not in held_out_kinds():
            break
    assert drawn.seed < FIRST_SEED
    assert drawn.kind not in held_out_kinds()
    return drawn


def interesting_box(drawn: Scene, canvas: Size, crop_px: int, rng: np.random.Generator) -> Box:
    """A crop of the canvas: half of them anywhere, half on the disk, the ridges or the shore."""
    centre_x, centre_y = rng.uniform(), rng.uniform()
    if rng.uniform() < 0.5:
        disk = drawn.disks[0]
        angle = rng.uniform(0, 2 * math.pi)
        spots = (
            (disk.x + disk.radius * math.cos(angle), disk.y + disk.radius * math.sin(angle)),
            (centre_x, rng.uniform(0.42, 0.62)),
            (centre_x, HORIZON + rng.normal() * 0.01),
        )
        centre_x, centre_y = spots[int(rng.integers(3))]
    top = int(np.clip(centre_y * canvas.height - crop_px / 2, 0, canvas.height - crop_px))
    left = int(np.clip(centre_x * canvas.width - crop_px / 2, 0, canvas.width - crop_px))
    return Box(top, left, crop_px, crop_px)


def ae_crop(rng: np.random.Generator, crop_px: int) -> np.ndarray:
    """One training crop as uint8 (3, crop_px, crop_px), at a zoom between the whole picture and 8192 px."""
    drawn = training_scene(rng)
    side = int(crop_px * 2 ** rng.uniform(0, math.log2(8192 / crop_px)))
    pixels = draw(drawn, Size(side, side), interesting_box(drawn, Size(side, side), crop_px, rng))
    return (pixels.transpose(2, 0, 1) * 255 + rng.uniform(size=(3, 1, 1))).clip(0, 255).astype(np.uint8)


def ae_batches(rng: np.random.Generator, pool_size: int, crop_px: int, batch_size: int) -> Iterator[Tensor]:
    """Batches (B, 3, h, w) in [-1, 1] from a pool that is filled first and then slowly replaced; flips for free."""
    pool = np.stack([ae_crop(rng, crop_px) for _ in range(pool_size)])
    while True:
        for slot in rng.integers(pool_size, size=2):
            pool[slot] = ae_crop(rng, crop_px)
        batch = torch.from_numpy(pool[rng.integers(pool_size, size=batch_size)]).float() / 127.5 - 1
        if rng.uniform() < 0.5:
            batch = batch.flip(-1)
        yield batch.contiguous(memory_format=torch.channels_last)


def spoken(drawn: Scene, rng: np.random.Generator) -> str:
    """The caption, mostly whole; sometimes with a clause left out, sometimes empty (for guidance)."""
    disk, third, mountains, ground, at = drawn.kind
    roll = rng.uniform()
    if roll < 0.10:
        return ""
    if roll > 0.25:
        return drawn.caption
    place = "" if rng.uniform() < 0.4 else (" in the middle" if third == "middle" else f" on the {third}")
    over = f" over {mountains} mountains" + (f" and a {ground}" if rng.uniform() < 0.5 else "")
    when = f" at {at}" if rng.uniform() < 0.6 else ""
    return f"a {disk}{place}{over if rng.uniform() < 0.7 else f' over a {ground}'}{when}"


@dataclass
class Pool:
    """Latents (N, 4, cells, cells) in half precision with what the model is told about each; filled, then replaced."""

    view: View
    latents: Tensor
    ids: Tensor
    scenes: list[Scene]

    @classmethod
    def empty(cls, view: View, size: int, cells: int) -> Pool:
        return cls(view, torch.zeros(size, 4, cells, cells).half(), torch.zeros(size, 6), [])

    def refill(self, count: int, vae: nn.Module, scale: float, rng: np.random.Generator) -> None:
        """Draw and encode `count` new views: into free places, or over random ones once there are none."""
        have, size = len(self.scenes), len(self.latents)
        slots = list(range(have, min(have + count, size))) or rng.integers(size, size=count // 2).tolist()
        views = [self.view(rng) for _ in slots]
        pixels = np.stack([draw(drawn, canvas, box).transpose(2, 0, 1) for drawn, canvas, box in views])
        batch = torch.from_numpy(pixels * 2 - 1).to(next(vae.parameters()).device)
        with torch.no_grad():
            latents = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist.mean * scale
        self.scenes += [views[0][0]] * (max(slots) + 1 - have)
        for slot, latent, (drawn, canvas, box) in zip(slots, latents.cpu().half(), views, strict=True):
            self.latents[slot], self.scenes[slot] = latent, drawn
            self.ids[slot] = torch.tensor([canvas.height, canvas.width, box.top, box.left, canvas.height, canvas.width])

    def sample(self, count: int, cells: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[Scene]]:
        """Random entries, or random crops of them where `cells` is smaller; crop offsets move along in the ids."""
        slots = rng.integers(len(self.scenes), size=count)
        offsets = rng.integers(self.latents.shape[-1] - cells + 1, size=(count, 2))
        crops = [self.latents[s, :, t : t + cells, u : u + cells] for s, (t, u) in zip(slots, offsets, strict=True)]
        ids = self.ids[torch.from_numpy(slots)].clone()
        ids[:, 2:4] += 8 * torch.from_numpy(offsets)
        return torch.stack(crops).float(), ids, [self.scenes[slot] for slot in slots]


def small_picture(rng: np.random.Generator) -> tuple[Scene, Size, Box]:
    """A whole picture at half the native size: what is where, learnt at a quarter of the cost."""
    return training_scene(rng), Size(4 * NATIVE_CELLS, 4 * NATIVE_CELLS), Box(0, 0, 4 * NATIVE_CELLS, 4 * NATIVE_CELLS)


def native_view(rng: np.random.Generator) -> tuple[Scene, Size, Box]:
    """A scene and a 256 px view of it: the whole picture (58 %), part of a wide or tall one (8 %), or a crop."""
    drawn, roll, side = training_scene(rng), rng.uniform(), 8 * NATIVE_CELLS
    if roll < 0.58:
        return drawn, Size(side, side), Box(0, 0, side, side)
    if roll < 0.66:
        wide = bool(rng.uniform() < 0.5)
        canvas = Size(side, side * 3 // 2) if wide else Size(side * 3 // 2, side)
        offset = 8 * int(rng.integers(side // 16 + 1))
        return drawn, canvas, Box(0 if wide else offset, offset if wide else 0, side, side)
    extent = 32 * round(side / 32 * 2 ** rng.uniform(0.4, 5.0))
    canvas = Size(extent, extent)
    box = interesting_box(drawn, canvas, side, rng)
    return drawn, canvas, Box(box.top // 8 * 8, box.left // 8 * 8, side, side)
