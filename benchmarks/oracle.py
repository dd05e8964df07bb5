"""A model with a known answer: the exact posterior mean of a random field with at most one object per native window.

The prior of a window of n x n cells, periodic: a Gaussian field of variance S(k) per mode, S ~ (|k|^2 + n^-2)^(-beta / 2),
plus, with probability p, one object g at a position drawn evenly. E[x0 | x] is in closed form, so every sampler and strategy
can be run on a denoiser that is right, and knows nothing beyond its window: on a larger canvas its windows each draw their
object, as a network trained at one size does. torch, float64 inside; x and the estimate are (B, 1, h, w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from hires.tiling.geometry import Size


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle:
    """The prior's numbers: `native` cells n, a field of mean square `variance`, an object `object_at` there with `presence`."""

    native: int = 64
    beta: float = 2.0
    variance: float = 0.25
    amplitude: float = 6.0
    spread: float = 4.0
    presence: float = 0.95

    def __call__(self, x: Tensor, sigma: float, cond: object = None) -> Tensor:
        """E[x0 | x], x = x0 + sigma n, of windows (B, 1, n, n); for larger canvases see `present`."""
        prior = prior_of(self, Size(x.shape[-2], x.shape[-1]))
        data, total = torch.fft.rfft2(x.double()), prior.spectrum + sigma**2
        objects = torch.fft.rfft2(self.present(self.logits(data, total, prior))) * prior.object
        field = (data - objects) * (prior.spectrum / total)
        estimate: Tensor = torch.fft.irfft2(objects + field, s=x.shape[-2:])
        return estimate.to(x.dtype)

    def object_at(self, radius: Tensor) -> Tensor:
        """g(r) = amplitude exp(-r^2 / (2 spread^2)) cos(2 pi r / (2.2 spread)), r in cells."""
        return (
            self.amplitude
            * torch.exp(-(radius**2) / (2 * self.spread**2))
            * torch.cos(2 * math.pi * radius / (2.2 * self.spread))
        )

    def logits(self, data: Tensor, total: Tensor, prior: Prior) -> Tensor:
        """ln of the posterior odds of an object at every cell against none, (B, 1, h, w).

        The matched filter less half the object's energy, both whitened by S + sigma^2, plus the prior's odds of a cell.
        """
        matched = torch.fft.irfft2(data * prior.object.conj() / total, s=(prior.size.height, prior.size.width))
        energy = (prior.halves * prior.object.abs() ** 2 / total).sum() / prior.size.area
        odds: Tensor = matched - energy / 2
        return odds + math.log(self.presence / (self.native**2 * (1 - self.presence)))

    def present(self, logits: Tensor) -> Tensor:
        """The posterior probability of an object at every cell: of a window, the softmax over its cells and "none".

        A larger canvas is taken as a network of convolutions takes it, every cell against the n x n cells around it and "none":
        one object per native area stays the law. On a window both are the same.
        """
        before, after = (self.native - 1) // 2, self.native // 2
        around = F.pad(logits, (before, after, before, after), mode="circular") if logits.shape[-2:] != self.window else None
        if around is None:
            rivals = logits.logsumexp((-2, -1), keepdim=True)
        else:
            rivals = around.unfold(-2, self.native, 1).logsumexp(-1).unfold(-1, self.native, 1).logsumexp(-1)
        return torch.exp(logits - torch.logaddexp(rivals, torch.zeros_like(rivals)))

    @property
    def window(self) -> tuple[int, int]:
        return self.native, self.native

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Windows of the prior, (count, 1, n, n) float64, and where their object is: (count, 2), -1 where there is none."""
        generator, n = torch.Generator().manual_seed(seed), self.native
        prior = prior_of(self, Size(n, n))
        white = torch.randn(count, 1, n, n, generator=generator, dtype=torch.float64)
        field = torch.fft.irfft2(torch.fft.rfft2(white) * prior.spectrum.sqrt(), s=self.window)
        places = torch.randint(n, (count, 2), generator=generator)
        there = torch.rand(count, generator=generator) < self.presence
        pictured = torch.fft.irfft2(prior.object, s=self.window)
        for index in there.nonzero().flatten().tolist():
            field[index, 0] += pictured.roll(places[index].tolist(), (0, 1))
        return field, torch.where(there[:, None], places, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """On a periodic canvas, in the half plane of rfft2: S (variance of a mode of unit white noise's scale), the transform of an
    object at cell 0, 0, and how often each mode counts."""

    size: Size
    spectrum: Tensor
    object: Tensor
    halves: Tensor


@lru_cache(maxsize=8)
def prior_of(oracle: Oracle, size: Size) -> Prior:
    """The prior on a canvas at least a window large; S is the window's, whose mean over modes is `variance`."""
    if min(size.height, size.width) < oracle.native:
        raise ValueError(f"canvas {size} is smaller than the oracle's window of {oracle.native}: give a larger one")
    window = _radial(oracle, Size(oracle.native, oracle.native), whole=True)
    rows, cols = (torch.minimum(i := torch.arange(n, dtype=torch.float64), n - i) for n in (size.height, size.width))
    halves = torch.full((size.width // 2 + 1,), 2.0, dtype=torch.float64)
    halves[0] = 1.0
    if size.width % 2 == 0:
        halves[-1] = 1.0
    return Prior(
        size=size,
        spectrum=_radial(oracle, size) * (oracle.variance / window.mean()),
        object=torch.fft.rfft2(oracle.object_at(torch.hypot(rows[:, None], cols[None, :]))),
        halves=halves,
    )


def _radial(oracle: Oracle, size: Size, whole: bool = False) -> Tensor:
    """(|k|^2 + n^-2)^(-beta / 2), k in cycles per cell, in the half plane or the whole."""
    rows = torch.fft.fftfreq(size.height, dtype=torch.float64)
    cols = (torch.fft.fftfreq if whole else torch.fft.rfftfreq)(size.width, dtype=torch.float64)
    squared: Tensor = rows[:, None] ** 2 + cols[None, :] ** 2
    spectrum: Tensor = (squared + oracle.native**-2.0).pow(-oracle.beta / 2)
    return spectrum


def find_objects(picture: Tensor, oracle: Oracle) -> list[tuple[int, int]]:
    """Rows and columns of the native-size objects of a picture (h, w): on a larger canvas, those are duplicates.

    Where the normalised correlation with the object, its mean taken off and cut to +-3 spreads, peaks above 0.55 in 15 x 15
    cells, and the plain correlation is above 0.4 of the object's own. The picture is mirrored at its edges.
    """
    reach = 3 * round(oracle.spread)
    i = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = oracle.object_at(torch.hypot(i[:, None], i[None, :]))
    kernel = kernel - kernel.mean()
    padded = F.pad(picture.double()[None, None], (reach,) * 4, mode="reflect")
    size, side = padded.shape[-2:], len(kernel)
    whole = torch.fft.irfft2(torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=size).conj(), s=size)
    raw, energy = whole[..., : size[0] - side + 1, : size[1] - side + 1], float((kernel**2).sum())
    mean, square = (F.avg_pool2d(part, side, stride=1) for part in (padded, padded**2))
    spread = (square - mean**2) * side**2
    likeness = raw / (spread.clamp_min(1e-9) * energy).sqrt()
    peak = likeness >= F.max_pool2d(likeness, 15, stride=1, padding=7)
    kept = peak & (likeness > 0.55) & (raw > 0.4 * energy)
    return [(int(row), int(col)) for row, col in kept[0, 0].nonzero()]
