"""PixArt-Σ and PixArt-α in text-to-image.

T5, a transformer on patches of latents, an AutoencoderKL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hires.checkpoints.families import PixArtShape
from hires.checkpoints.model import ModelSpec
from hires.kernels.attention_policies import Attending, everywhere
from hires.models.pixart import POSITION_MODES, PixArtNetwork
from hires.pipelines.base import Family, Runtime, Session, preconditioned
from hires.protocols import Denoiser
from hires.sampling.conditioning import Conditioning, pixart_resolution
from hires.tiling.geometry import Size


class PixArtSigma(Session):
    """A PixArt transformer, steered by the edges of `picture` where its checkpoint has a ControlNet.

    position_mode: 'global' places a tile where it lies on the canvas, 'local' takes it for a whole picture, 'blend' lies
    half-way.
    """

    def __init__(
        self,
        family: Family,
        texts: Sequence[Conditioning],
        runtime: Runtime,
        *,
        position_mode: str = "global",
        picture: NDArray[np.uint8] | None = None,
    ) -> None:
        share = POSITION_MODES[position_mode]
        super().__init__(family, texts, runtime, picture=picture)
        span = family.spec.facts.position_span
        assert span is not None, f"{family.spec.family} has no position span"
        self._network = PixArtNetwork(
            family.network,
            span=span,
            global_share=share,
            thin=_shape(family.spec).kv_compression,
            control=family.control,
            backend=runtime.backend,
        )

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        """With the canvas in cells, and PixArt-α's resolution and aspect ratio."""
        resolution = pixart_resolution(canvas_px, text.batch) if self.spec.facts.size_conditions == "pixart" else None
        return replace(text, canvas=canvas_px.divided(self.spec.cell_px), resolution=resolution)

    def conditions(self, canvas_px: Size) -> list[Conditioning]:
        """With the edges' latents where a ControlNet follows them, for all estimates."""
        texts = super().conditions(canvas_px)
        if self.picture is None:
            return texts
        edges = self.picture_at(canvas_px)
        return [replace(text, image_latents=edges) for text in texts]

    def denoiser(self, policy: Attending = everywhere) -> Denoiser:
        """The preconditioned transformer, its estimates checked to be finite."""
        return preconditioned(self.spec, self.guard.of(self._network.attending(policy)))


def _shape(spec: ModelSpec) -> PixArtShape:
    assert isinstance(spec.network, PixArtShape), f"{spec.family} is no PixArt model"
    return spec.network
