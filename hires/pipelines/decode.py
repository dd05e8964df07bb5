"""Decode latents in bands into a sink, with a colour fix or a mask on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hires.devices.memory import peak_device_bytes, reset_peak
from hires.errors import MemoryLadderError
from hires.events import Event, OnEvent, StageStats
from hires.images.sinks import ImageSink
from hires.images.whole import fitted
from hires.kernels.blend import to_integers
from hires.pipelines.base import Session
from hires.pipelines.progressive import Denoised
from hires.planning.plan import MemoryPlan
from hires.refine.colour_fix import ColourStatistics, adain, wavelet_fixed
from hires.resume.journal import NO_JOURNAL, Journal
from hires.tiling.geometry import Box, Size, relay_view
from hires.tiling.resize import Enlarged, Padded
from hires.tiling.retry import attempt, free_memory
from hires.tiling.vae import PixelSource

log = logging.getLogger(__name__)
Fixer = Callable[[Callable[[], Iterator[torch.Tensor]]], Iterator[torch.Tensor]]
"""From what decodes a picture in bands, callable more than once, to its bands with other colours."""


def colour_fixer(session: Session, plan: MemoryPlan, denoised: Denoised, picture: NDArray[np.uint8] | None) -> Fixer | None:
    """The colour fix of a plan: towards the picture that was given, else towards the base picture; None without either."""
    if plan.colour_fix is None or (picture is None and len(plan.stages) == 1):
        return None

    def fixed(bands: Callable[[], Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        reference = Padded(fitted(picture, plan.canvas), plan.canvas) if picture is not None else base_picture()
        if plan.colour_fix == "wavelet":
            return wavelet_fixed(bands(), reference)
        target = ColourStatistics.of(source_bands(reference))
        own = ColourStatistics.of(band.cpu() for band in bands())
        return (adain(band.cpu(), own, target) for band in bands())

    def base_picture() -> Enlarged:
        rows = [band.float().cpu() for band in session.decode_bands(denoised.first, lambda done, total: None)]
        base = torch.cat(rows, dim=-2)
        return Enlarged(base, *relay_view(Size(base.shape[-2], base.shape[-1]), plan.canvas))

    return fixed


def masked_fixer(picture: NDArray[np.uint8], mask: NDArray[np.uint8], fix: Fixer | None) -> Fixer:
    """After another fix, if there is one: the picture's own pixels where its mask (H, W) is 0, blends of both between."""

    def fixed(bands: Callable[[], Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        top = 0
        for band in bands() if fix is None else fix(bands):
            bottom = top + band.shape[-2]
            rows = torch.from_numpy(np.ascontiguousarray(picture[top:bottom])).to(band.device).permute(2, 0, 1)[None]
            share = torch.from_numpy(np.ascontiguousarray(mask[top:bottom])).to(band.device).float() / 255
            known = rows.to(band.dtype) / 127.5 - 1
            yield torch.where(share > 0, torch.lerp(known, band, share.to(band.dtype).expand_as(band)), known)
            top = bottom

    return fixed


def source_bands(source: PixelSource, rows: int = 256) -> Iterator[torch.Tensor]:
    """A picture from top to bottom, (1, 3, rows, W) at a time."""
    size = source.size
    for top in range(0, size.height, rows):
        yield source.crop(Box(top, 0, min(rows, size.height - top), size.width))


def decode(
    session: Session,
    latents: torch.Tensor,
    open_sink: Callable[[], ImageSink],
    tell: OnEvent,
    journal: Journal = NO_JOURNAL,
    fix: Fixer | None = None,
) -> StageStats:
    """The picture into the sink that is opened last, which stays open; what it took.

    Where no exact way has room the small autoencoder starts over, if there is one.
    """
    decoding = _Decoding(session=session, latents=latents, open_sink=open_sink, tell=tell, fix=fix)
    if session.tiny is None:
        return decoding.run(session.decode_bands, journal)
    try:
        return decoding.run(session.decode_bands, journal)
    except MemoryLadderError as error:
        message = str(error)
    free_memory()
    log.warning("%s; decoding with the tiny autoencoder, an approximation", message)
    return replace(decoding.run(session.decode_tiny, NO_JOURNAL), stage="decode (tiny)")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoding:
    """Latents on their way into a sink."""

    session: Session
    latents: torch.Tensor
    open_sink: Callable[[], ImageSink]
    """Opens an empty sink; called again for each way that has to start over."""
    tell: OnEvent
    fix: Fixer | None

    def run(self, decode_bands: Callable[..., Iterator[torch.Tensor]], journal: Journal) -> StageStats:
        """Decode band by band. A colour fix needs rows above the first missing one, so it has no journal of bands."""
        vae, tiles, begun = self.session.vae, 0, time.monotonic()
        retries, recomputed = vae.retries, vae.recomputed
        reset_peak(self.session.device)

        def on_band(done: int, total: int) -> None:
            nonlocal tiles
            tiles = total
            self.tell(Event(stage="decode", done=done, total=total))

        fill = partial(self._fill, partial(decode_bands, self.latents, on_band), journal)
        sink, message = attempt(fill, self.open_sink())
        while sink is None:  # outside the bands, which have a ladder of their own
            vae.descend(message)
            sink, message = attempt(fill, self.open_sink())
        return StageStats(
            stage="decode",
            seconds=round(time.monotonic() - begun, 3),
            peak_bytes=peak_device_bytes(self.session.device),
            tiles=tiles,
            retries=vae.retries - retries,
            recomputed=vae.recomputed - recomputed,
        )

    def _fill(self, decode_bands: Callable[..., Iterator[torch.Tensor]], journal: Journal, sink: ImageSink) -> ImageSink:
        """Write the journal's rows, then decode the others."""
        done, bits = 0, 8 * sink.dtype.itemsize
        for rows in journal.rows():
            if rows.dtype != sink.dtype:
                break  # they were of other bits
            sink.put(rows)
            done += len(rows)
        with torch.inference_mode():
            plain = partial(decode_bands, *([done] if done else []))
            for band in plain() if self.fix is None else self.fix(plain):
                rows = to_integers(band[0], bits).cpu().numpy()
                journal.keep_rows(done, rows)
                sink.put(rows)
                done += len(rows)
        return sink
