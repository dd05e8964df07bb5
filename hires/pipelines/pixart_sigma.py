"""PixArt-Σ and PixArt-α in text-to-image: T5, a transformer on patches of latents, an AutoencoderKL."""

from __future__ import annotations

from dataclasses import replace

import torch

from hires.conditioning import Conditioning, pixart_resolution
from hires.denoisers import Denoiser
from hires.errors import RequestError, unknown
from hires.families import PixArtShape
from hires.kernels.dispatch import AttentionSpec, select
from hires.pipelines.base import LoadedFamily, Parts, preconditioned
from hires.pixart import POSITION_MODES, PixArtNetwork, second_half_factors
from hires.specs import ModelSpec
from hires.tiling.geometry import Size
from hires.tiling.retry import Ladder
from hires.types import DecodePlan

KV_COMPRESSIONS = ("checkpoint", "average")


class PixArtSigma(LoadedFamily):
    """A PixArt transformer.

    position_mode: 'global' places a tile where it lies on the canvas, 'local' takes it for a whole picture, 'blend' lies
    half-way. kv_compression: 'checkpoint' thins keys and values where the checkpoint was trained to; 'average' is an
    experiment that pools 2 x 2 of them in the second half of the blocks, for weights that were not: 4K in two thirds of
    the FLOPs, and another picture. RequestError for unknown names.
    """

    def __init__(
        self,
        spec: ModelSpec,
        parts: Parts,
        *,
        device: torch.device,
        dtype: str,
        decode: Ladder[DecodePlan],
        position_mode: str = "global",
        kv_compression: str = "checkpoint",
    ) -> None:
        thin, share = _factors(_shape(spec), kv_compression), _share(position_mode)
        super().__init__(spec, parts, device=device, dtype=dtype, decode=decode)
        assert spec.facts.position_span is not None, f"{spec.family} has no position span"
        self._network = PixArtNetwork(parts.network, span=spec.facts.position_span, global_share=share, thin=thin)

    def backends(self, tile: Size) -> tuple[tuple[str, str], ...]:
        """Which attention backend runs the self-attention of a tile (in cells), by the dispatch's own rule."""
        shape = _shape(self.spec)
        tokens = tile.area // shape.patch**2
        spec = AttentionSpec(
            device=self.device.type, dtype=self.dtype, head_dim=shape.head_dim, queries=tokens, keys=tokens, masked=False
        )
        return (("attention", select(spec).name),)

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        resolution = pixart_resolution(canvas_px) if self.spec.facts.size_conditions == "pixart" else None
        return replace(text, canvas=canvas_px.divided(self.spec.cell_px), resolution=resolution)

    def denoiser(self) -> Denoiser:
        return preconditioned(self.spec, self._network)


def _shape(spec: ModelSpec) -> PixArtShape:
    assert isinstance(spec.network, PixArtShape), f"{spec.family} is no PixArt model"
    return spec.network


def _share(position_mode: str) -> float:
    if position_mode not in POSITION_MODES:
        raise RequestError(unknown("position mode", position_mode, POSITION_MODES))
    return POSITION_MODES[position_mode]


def _factors(shape: PixArtShape, kv_compression: str) -> tuple[int, ...]:
    if kv_compression not in KV_COMPRESSIONS:
        raise RequestError(unknown("key-value compression", kv_compression, KV_COMPRESSIONS))
    return shape.kv_compression if kv_compression == "checkpoint" else second_half_factors(shape.layers)
