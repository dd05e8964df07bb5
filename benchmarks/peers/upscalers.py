"""A network that enlarges in tiles when memory runs out: chaiNNer's way, written out from its description, beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.peers import Way, version_of
from benchmarks.rows import AbsentError
from benchmarks.suites.io import DATA
from hires.tiling.geometry import Size
from hires.tiling.network import NetworkRows, Tiling
from hires.tiling.retry import is_out_of_memory

WAYS = ("whole", "halving, as chaiNNer", "hires")
OVERLAP, LEAST, ROOM = 16, 16, 256**2
"""chaiNNer's overlap on each side and smallest tile (auto_split.py); and the pixels that the network has room for here."""
NETWORK = DATA / "upscalers" / "RealESRGAN_General_x4_v3.safetensors"
PHOTO = DATA / "photos" / "kodim19.png"


@dataclass
class Metered:
    """A network that runs out of memory above `room` pixels of its input, and counts what it computed."""

    network: Callable[[Tensor], Tensor]
    room: float = math.inf
    pixels: int = 0
    refused: int = 0

    def __call__(self, part: Tensor) -> Tensor:
        count = part.shape[-1] * part.shape[-2]
        if count > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        self.pixels += count
        return self.network(part)


def enlarged(name: str, side: int, quick: bool) -> Way:
    """A square crop of a photograph, x4 by Real-ESRGAN's compact network; whole it has no limit, the others have one."""
    from hires.models.upscalers import load_upscaler
    from tests.support.spandrel_here import why_not

    lacking = why_not()
    if lacking is not None or not PHOTO.is_file():
        raise AbsentError(lacking or "the test data is absent")
    made = load_upscaler(NETWORK, torch.device("cpu"))
    picture = crop(side)
    metered = Metered(made.network, math.inf if name == "whole" else ROOM // (8 if quick else 1))
    tiling = Tiling(rows=side, cols=side, halo=made.halo.pixels, multiple=made.multiple)
    runs: dict[str, Callable[[], Tensor]] = {
        "whole": lambda: made.network(picture[None])[0],
        "hires": lambda: ours(picture, metered, made.scale, tiling),
        "halving, as chaiNNer": lambda: halving(picture, metered, made.scale),
    }
    package = (
        version_of("spandrel") if name == "whole" else version_of("hires") if name == "hires" else "auto_split.py of 874b878"
    )
    facts = {"version": package, "note": ""}

    def run() -> Tensor:
        metered.pixels = metered.refused = 0
        found = runs[name]()
        work = f"computes {metered.pixels / side**2:.2f} times its pixels, refused {metered.refused} times"
        facts["note"] = "" if name == "whole" else f"room for {int(metered.room)} px of input: {work}"
        return found

    warm = picture[None, :, :64, :64]
    return Way(run=run, warm_up=lambda: made.network(warm), facts=facts, like="whole")


def crop(side: int) -> Tensor:
    """(3, side, side) in [0, 1] of a photograph."""
    with Image.open(PHOTO) as opened:
        pixels = np.asarray(opened.convert("RGB"))[:side, :side]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


@dataclass(frozen=True, slots=True)
class Planes:
    """A tensor (C, H, W) as a source of rows."""

    planes: Tensor

    @property
    def size(self) -> Size:
        return Size(self.planes.shape[1], self.planes.shape[2])

    def rows(self, top: int, bottom: int) -> Tensor:
        return self.planes[:, top:bottom]


def ours(picture: Tensor, network: Callable[[Tensor], Tensor], scale: int, tiling: Tiling) -> Tensor:
    rows = NetworkRows(Planes(picture), network, scale, tiling)
    return rows.rows(0, rows.size.height)


def halving(picture: Tensor, network: Callable[[Tensor], Tensor], scale: int) -> Tensor:
    """The whole first; after every out-of-memory tiles of half the side, each with `OVERLAP` px around it, blended where they
    overlap. What was finished is not kept here, which costs it no pixels that are counted."""
    side = max(picture.shape[1:])
    while side >= LEAST:
        try:
            return blended(picture, network, scale, side)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        side //= 2
    raise MemoryError(f"not even a tile of {LEAST} px has room")


def blended(picture: Tensor, network: Callable[[Tensor], Tensor], scale: int, side: int) -> Tensor:
    """Even tiles of at most `side` px."""
    height, width = picture.shape[1:]
    total, weight = (torch.zeros(3, height * scale, width * scale) for _ in range(2))
    for top, bottom in spans_of(height, side):
        for left, right in spans_of(width, side):
            box = [
                (max(0, a - OVERLAP), min(b + OVERLAP, n))
                for a, b, n in zip((top, left), (bottom, right), picture.shape[1:], strict=True)
            ]
            (y0, y1), (x0, x1) = box
            part = network(picture[None, :, y0:y1, x0:x1])[0]
            share = torch.outer(*(ramp(start, stop, n, scale) for (start, stop), n in zip(box, picture.shape[1:], strict=True)))
            window = slice(y0 * scale, y1 * scale), slice(x0 * scale, x1 * scale)
            total[:, *window] += part * share
            weight[:, *window] += share
    return total / weight


def around(start: int, stop: int, extent: int) -> tuple[int, int]:
    return max(0, start - OVERLAP), min(stop + OVERLAP, extent)


def spans_of(extent: int, side: int) -> list[tuple[int, int]]:
    count = math.ceil(extent / side)
    each = math.ceil(extent / count)
    return [(start, min(start + each, extent)) for start in range(0, extent, each)]


def ramp(start: int, stop: int, extent: int, scale: int) -> Tensor:
    """Weights along one side of a tile, half a sine over the middle half of what two tiles share where the picture goes on."""
    weights = torch.ones((stop - start) * scale)
    along = torch.linspace(0, 1, 2 * OVERLAP * scale).mul(2).sub(0.5).clamp(0, 1)
    turn = (1 - torch.cos(along * math.pi)) / 2
    if start > 0:
        weights[: len(turn)] *= turn[: len(weights)]
    if stop < extent:
        weights[-len(turn) :] *= turn.flip(0)[-len(weights) :]
    return weights
