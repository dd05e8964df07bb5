"""How far a network looks, measured: what one pixel of its input can change in its output, and what a halo leaves wrong.

A pixel that is not a number makes every output that reads it not a number, whatever the weights; so the rows that a NaN reaches
are the receptive field, exactly, of convolutions as of attention windows. Measured on a strip that is tall and narrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
STRIPS = (192, 768)  # rows; the second shows reaches up to 383, ESRGAN's 351 among them
WIDTH = 16
HALOS = (8, 16, 24, 32, 48, 64, 96, 128)
CORE = 64
SAME = 1 / 512  # half a level of 8 bits: what a halo may leave wrong on the probe
NO_BETTER = 1.5  # or so many times what the widest leaves, where something looks at all of the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Halo:
    """Pixels of the input that a tile reads beyond its own. reach: the receptive radius, None where it has no end; error: the
    largest difference that the halo left on the probe, 0 where it covers the reach."""

    pixels: int
    reach: int | None
    error: float

    @property
    def exact(self) -> bool:
        return self.reach is not None and self.pixels >= self.reach

    def __str__(self) -> str:
        if self.exact:
            return f"tiles read {self.pixels} px around them, all that the network sees: the same as whole"
        sees = f"{self.reach} px" if self.reach is not None else "the whole picture"
        return (
            f"approximation: the network sees {sees}, tiles read {self.pixels} px around them; "
            f"largest difference on a probe {self.error:.1e}"
        )


def reach(network: Network, channels: int, scale: int, multiple: int = 1) -> int | None:
    """The receptive radius in pixels of the input, on either axis; None where it is beyond what the tallest strip can show.

    network: (1, channels, h, w) to (1, _, scale h, scale w), float32 on the CPU, h and w multiples of `multiple`, whose
    windows begin at multiples of it: the widest of three places in one is taken.
    """
    widest = 0
    for place in sorted({0, multiple // 2, multiple - 1}):
        for axis in (0, 1):
            radius = _reach(network, channels, scale, multiple, place, axis)
            if radius is None:
                return None
            widest = max(widest, radius)
    return widest


def _reach(network: Network, channels: int, scale: int, multiple: int, place: int, axis: int) -> int | None:
    width = -(-WIDTH // multiple) * multiple
    for tall in STRIPS:
        rows = -(-tall // multiple) * multiple
        at = rows // 2 // multiple * multiple + place
        strip = torch.full((1, channels, rows, width), 0.5)
        strip[:, :, at, width // 2] = torch.nan
        out = _plainly(network, strip if axis == 0 else strip.mT.contiguous())
        touched = torch.isnan(out if axis == 0 else out.mT).any(dim=-1).any(dim=1)[0].nonzero().flatten()
        if not len(touched):
            return 0
        first, last = int(touched[0]) // scale, int(touched[-1]) // scale
        if first > 0 and last < rows - 1:
            return max(at - first, last - at)
    return None


def _plainly(network: Network, strip: Tensor) -> Tensor:
    """By convolutions that read what they need: Winograd's, which oneDNN may take, spread a NaN over their tiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of TF32 on other hardware, on switching oneDNN off
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
            return network(strip)


def probe_picture(channels: int, height: int, width: int) -> Tensor:
    """A 1/f texture in [0, 1], (1, channels, height, width), the same each time: about what photographs hold."""
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]).clamp_min(
        1 / max(height, width)
    )
    texture = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, (height, width))
    picture: Tensor = (0.5 + 0.2 * texture / texture.std()).clamp(0, 1)
    return picture


def measured_halo(network: Network, channels: int, scale: int, multiple: int, known: int | None) -> Halo:
    """The smallest halo that leaves at most `SAME` wrong on a probe, or hardly more than the widest does, with what it leaves.

    A strip whole against its middle cut out with the halo above and below.
    """
    core, most, width = (-(-extent // multiple) * multiple for extent in (CORE, HALOS[-1], 2 * WIDTH))
    strip = probe_picture(channels, core + 4 * most, width)
    middle = 2 * most
    with torch.inference_mode():
        whole = network(strip)[:, :, middle * scale : (middle + core) * scale]

        def left_wrong(halo: int) -> float:
            part = network(strip[:, :, middle - halo : middle + core + halo])
            return float((part[:, :, halo * scale : (halo + core) * scale] - whole).abs().max())

        enough = max(SAME, NO_BETTER * left_wrong(most))
        for halo in sorted({-(-step // multiple) * multiple for step in HALOS}):
            error = left_wrong(halo)
            if error <= enough:
                break
    return Halo(pixels=halo, reach=known, error=error)


MOST_EXACT = 64  # pixels of a halo beyond which exact tiles would be mostly halo


def choose_halo(network: Network, channels: int, scale: int, multiple: int = 1) -> Halo:
    """All that the network sees where that is at most `MOST_EXACT`, so that tiles are exact; else the measured halo."""
    radius = reach(network, channels, scale, multiple)
    if radius is not None and radius <= MOST_EXACT:
        return Halo(pixels=-(-radius // multiple) * multiple, reach=radius, error=0.0)
    return measured_halo(network, channels, scale, multiple, radius)
