"""Measures a network's receptive field, and the error of tiles with a given halo.

A NaN pixel turns every output that depends on it into NaN, whatever the weights. So the rows that a NaN reaches are exactly
the receptive field, for convolutions and for attention windows. It is measured on a tall and narrow strip.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]
STRIPS = (192, 768)  # rows; the second one shows reaches up to 383, ESRGAN's is 351
WIDTH = 16
HALOS = (8, 16, 24, 32, 48, 64, 96, 128)
CORE = 64
SAME = 1 / 512  # half a level of 8 bits: the error that a halo may leave on the probe picture
NO_BETTER = 1.5  # or so many times the error of the widest halo, for networks that read the whole picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Halo:
    """What a tile reads beyond its own pixels."""

    pixels: int
    """Pixels of the input on each side."""
    reach: int | None
    """The network's receptive radius in pixels; None if it spans the whole picture."""
    error: float
    """The largest difference on the probe picture; 0 if the halo covers the reach."""

    @property
    def exact(self) -> bool:
        """Whether tiles give the same result as the whole picture."""
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
    """The receptive radius in pixels of the input, the wider of both axes; None if it exceeds the tallest strip.

    Args:
        network: (1, channels, h, w) to (1, _, scale h, scale w), float32 on the CPU.
        channels: of the input.
        scale: how much larger the output is.
        multiple: h and w are multiples of it, and so are the starts of the network's windows; the radius is the widest of
            three positions inside a window.
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
        out = _without_mkldnn(network, strip if axis == 0 else strip.mT.contiguous())
        touched = torch.isnan(out if axis == 0 else out.mT).any(dim=-1).any(dim=1)[0].nonzero().flatten()
        if not len(touched):
            return 0
        first, last = int(touched[0]) // scale, int(touched[-1]) // scale
        if first > 0 and last < rows - 1:
            return max(at - first, last - at)
    return None


def _without_mkldnn(network: Network, strip: Tensor) -> Tensor:
    """The network's output by plain convolutions: oneDNN may use Winograd's, which spread a NaN over their tiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about TF32 on other hardware, when oneDNN is switched off
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
            return network(strip)


def probe_picture(channels: int, height: int, width: int) -> Tensor:
    """A fixed 1/f texture in [0, 1], (1, channels, height, width): the spectrum of photographs."""
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1))
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]).clamp_min(
        1 / max(height, width)
    )
    texture = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, (height, width))
    picture: Tensor = (0.5 + 0.2 * texture / texture.std()).clamp(0, 1)
    return picture


def measured_halo(network: Network, channels: int, scale: int, multiple: int, known: int | None) -> Halo:
    """The smallest halo whose error on a probe picture is at most `SAME`, or hardly more than that of the widest halo.

    Compares a strip with its middle part, cut out with the halo above and below. known: the receptive radius, if it is known.
    """
    core, most, width = (-(-extent // multiple) * multiple for extent in (CORE, HALOS[-1], 2 * WIDTH))
    strip = probe_picture(channels, core + 4 * most, width)
    middle = 2 * most
    with torch.inference_mode():
        whole = network(strip)[:, :, middle * scale : (middle + core) * scale]

        def error_of(halo: int) -> float:
            part = network(strip[:, :, middle - halo : middle + core + halo])
            return float((part[:, :, halo * scale : (halo + core) * scale] - whole).abs().max())

        enough = max(SAME, NO_BETTER * error_of(most))
        for halo in sorted({-(-step // multiple) * multiple for step in HALOS}):
            error = error_of(halo)
            if error <= enough:
                break
    return Halo(pixels=halo, reach=known, error=error)


MOST_EXACT = 64  # pixels of a halo beyond which exact tiles would be mostly halo


def choose_halo(network: Network, channels: int, scale: int, multiple: int = 1) -> Halo:
    """The receptive radius if it is at most `MOST_EXACT`, so that tiles are exact; else the measured halo."""
    radius = reach(network, channels, scale, multiple)
    if radius is not None and radius <= MOST_EXACT:
        return Halo(pixels=-(-radius // multiple) * multiple, reach=radius, error=0.0)
    return measured_halo(network, channels, scale, multiple, radius)
