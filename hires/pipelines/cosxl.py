"""CosXL, SDXL and SD1.5 in text-to-image.

CLIP text encoders, a UNet, and SDXL's size conditions where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hires.kernels.attention_policies import Attending, everywhere
from hires.models.attention_processors import dispatch_attention
from hires.models.unet import UNetNetwork
from hires.pipelines.base import Family, Runtime, Session, convolutions_last, preconditioned
from hires.protocols import Denoiser
from hires.sampling.conditioning import Conditioning, sdxl_size_ids
from hires.tiling.geometry import Size


class CosXL(Session):
    """A UNet that draws from text."""

    def __init__(self, family: Family, texts: Sequence[Conditioning], runtime: Runtime) -> None:
        super().__init__(family, texts, runtime)
        network = dispatch_attention(family.network, runtime.backend)
        self._network = UNetNetwork(convolutions_last(network, runtime.device), self.dtype)

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        """With SDXL's size numbers, where the family has them."""
        if not self.spec.facts.size_conditions:
            return text
        return replace(text, size_ids=sdxl_size_ids(canvas_px, text.batch, self.prompted.size))

    def denoiser(self, policy: Attending = everywhere) -> Denoiser:
        """The preconditioned UNet, its estimates checked to be finite."""
        return preconditioned(self.spec, self.guard.of(self._network.attending(policy)))
