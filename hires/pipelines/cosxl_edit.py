"""CosXL-Edit and SDXL InstructPix2Pix: an instruction changes a picture.

The UNet sees the picture beside the noisy latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hires.kernels.attention_policies import Attending, everywhere
from hires.models.attention_processors import dispatch_attention
from hires.models.unet import UNetNetwork
from hires.pipelines.base import Family, Runtime, Session, convolutions_last, preconditioned
from hires.planning.plan import StagePlan
from hires.prompts.script import Step
from hires.protocols import Denoiser
from hires.sampling.conditioning import Conditioning, sdxl_size_ids
from hires.sampling.guidance import edit_guided, within
from hires.tiling.geometry import Size


class CosXLEdit(Session):
    """A UNet of 8 input channels and the picture (H, W, 3) uint8 that it changes.

    Every stage sees the picture at its own size: encoded once per canvas, the mean of the posterior, and zeros for the
    estimate without it.
    """

    def __init__(self, family: Family, texts: Sequence[Conditioning], runtime: Runtime, *, picture: NDArray[np.uint8]) -> None:
        super().__init__(family, texts, runtime, picture=picture)
        network = dispatch_attention(family.network, runtime.backend)
        self._network = UNetNetwork(convolutions_last(network, runtime.device), self.dtype)

    def sized(self, text: Conditioning, canvas_px: Size) -> Conditioning:
        """With SDXL's size numbers."""
        return replace(text, size_ids=sdxl_size_ids(canvas_px, text.batch, self.prompted.size))

    def denoiser(self, policy: Attending = everywhere) -> Denoiser:
        """The preconditioned UNet, its estimates checked to be finite."""
        return preconditioned(self.spec, self.guard.of(self._network.attending(policy)))

    def guided_by(
        self, on_canvas: Denoiser, stage: StagePlan, texts: Sequence[Conditioning], step: Step
    ) -> tuple[Denoiser, Conditioning]:
        """Guidance by text and by image on the canvas: three estimates (Brooks et al. 2023)."""
        conditional, unconditional = texts[step.positive[0][0]], texts[step.negative]
        image = self.picture_at(stage.canvas)
        if not self.spec.facts.image_scaled:  # InstructPix2Pix sees it as the autoencoder gives it
            image = image / self.spec.latent_scale
        with_image = replace(unconditional, image_latents=image)
        without = replace(unconditional, image_latents=torch.zeros_like(image))
        guide = edit_guided(on_canvas, with_image, without, stage.guidance, stage.image_guidance)
        if stage.guidance_interval is not None:  # outside it the instruction and the picture, without what they differ from
            guide = within(guide, on_canvas, *stage.guidance_interval)
        return guide, replace(conditional, image_latents=image)
