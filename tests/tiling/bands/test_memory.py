"""Predicted bytes of the full SDXL autoencoder against what its operators allocate, on fake tensors in bfloat16."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from benchmarks.allocations import Allocations, counted
from hires.tiling import vae as banded
from hires.tiling.bands.memory import VaeShape
from hires.tiling.bands.storage import BandStorage, VaeTask, vae_policy
from hires.tiling.geometry import Box, Size

SDXL = VaeShape(channels=(128, 256, 512, 512), resnets=2, latent_channels=4, mid_attention=True)
LIMITS_GIB = {  # at 4096 px and 8192 px, weights of 0.16 GiB included
    (4096, "recompute_up"): 11.0,
    (4096, "recompute_conv"): 7.5,
    (8192, "recompute_conv"): 20.0,
    (4096, "host"): 2.0,
    (8192, "host"): 2.0,
}


class FakePicture:
    def __init__(self, side: int) -> None:
        self.size = Size(side, side)

    def crop(self, part: Box) -> torch.Tensor:
        return torch.empty(1, 3, part.height, part.width, dtype=torch.bfloat16)


def measured(side: int, policy: str, encode: bool) -> Allocations:
    from diffusers import AutoencoderKL

    rung = BandStorage(policy=policy, band_rows=64, peak_bytes=0, host_bytes=0, flops=0)
    with counted() as found:
        torch.set_default_dtype(torch.bfloat16)
        try:
            vae = AutoencoderKL(
                block_out_channels=SDXL.channels,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
                norm_num_groups=32,
            )
        finally:
            torch.set_default_dtype(torch.float32)
        z = torch.empty(1, 4, side // 8, side // 8, dtype=torch.bfloat16)
        found.live = found.peak = found.largest = 0
        with mock.patch("hires.tiling.bands.transfer.to_host", found.move_to_host):
            if encode:
                banded.Run(vae).encode(FakePicture(side), rung)
            else:
                for rows in banded.Run(vae).decode(z, rung):
                    del rows
    return found


FAST = [(640, "bands")]
SIDES, POLICIES = (640, 1024, 2048, 4096, 8192), ("bands", "recompute_up", "recompute_conv", "host")
SLOW = [(side, policy) for side in SIDES for policy in POLICIES]


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize(
    ("side", "policy"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in FAST)]
)
def test_predicted_bytes_are_enough_and_not_many_more(side: int, policy: str, encode: bool) -> None:
    found = measured(side, policy, encode)
    task = VaeTask(shape=SDXL, cells=Size(side // 8, side // 8), element=2, encode=encode)
    predicted = vae_policy(task, policy, 64)
    assert found.peak <= predicted.peak_bytes <= 1.05 * found.peak
    assert found.host_peak <= predicted.host_bytes <= 1.05 * found.host_peak
    assert found.largest < 2**31, "an operator was handed more elements than 32-bit indices reach"
    limit = LIMITS_GIB.get((side, policy))
    if limit is not None:
        assert predicted.peak_bytes / 2**30 + 0.16 <= limit
