"""Half precision made safe: single operations in float32, and a guard against NaN."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from hires.errors import NotFiniteError
from hires.kernels.single_precision import finite_pictures
from hires.protocols import Network
from hires.sampling.conditioning import Conditioning

log = logging.getLogger(__name__)


class SingleNetwork(Network, Protocol):
    """A network that can be told to compute in float32."""

    def in_single(self) -> AbstractContextManager[None]:
        """Within it, the network computes in float32."""
        ...


class Guarded:
    """Watches that estimates are finite: pictures that are not are evaluated once more in float32, and counted in `redone`.

    NotFiniteError where that does not help. A picture that the sampler hands over with NaN is not the network's.
    """

    def __init__(self) -> None:
        self.redone = 0

    def of(self, network: SingleNetwork) -> Network:
        """The same network, its estimates watched."""

        def evaluated(x: Tensor, time: float, cond: Conditioning) -> Tensor:
            output = network(x, time, cond)
            good = finite_pictures(output)
            if bool(good.all()):
                return output
            with network.in_single():
                wide = network(x.float(), time, cond.to(x.device, torch.float32))
            bad = [i for i, fine in enumerate(good.tolist()) if not fine]
            if not bool(finite_pictures(wide)[~good].all()):
                where = f", tile at {cond.places[bad[0]]} of the latents" if cond.places is not None else ""
                raise NotFiniteError(
                    f"the network gives NaN or infinity at time {time:g}{where}, in float32 too: the checkpoint or a LoRA is "
                    "damaged, or values are out of range; download it again, or leave `loras`, `guidance` or `sigma_max` out"
                )
            self.redone += len(bad)
            log.warning("%d tile(s) overflowed at time %g and were evaluated again in float32", len(bad), time)
            return torch.where(good.view(-1, *[1] * (output.ndim - 1)), output.float(), wide.float())

        return evaluated
