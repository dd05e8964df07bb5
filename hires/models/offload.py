"""Moves weights between the device and host memory.

All on the device, one of network and autoencoder at a time, or fetched layer by layer.

The picture does not depend on it. On a CPU there is one memory, and nothing to do.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from hires._imports import quiet_imports
from hires.planning.plan import WHERE
from hires.planning.search import OFFLOADS
from hires.tiling.retry import empty_cache, free_memory

HOST = torch.device("cpu")
log = logging.getLogger(__name__)


class Weights:
    """Keeps the part that is about to work on the device, as `offload` says; `relieve` goes on to the next place."""

    def __init__(self, network: nn.Module, vae: nn.Module, device: torch.device, offload: str = "none") -> None:
        assert offload in OFFLOADS, offload
        self.parts: dict[str, nn.Module] = {"network": network, "vae": vae}
        self.device, self.offload = device, "none"
        self.resting = False
        """Whether all of them are in host memory until `wake`."""
        for name in OFFLOADS[1 : OFFLOADS.index(offload) + 1]:
            self._take(name)

    def ready(self, part: str) -> None:
        """Bring a part, 'network' or 'vae', to the device, and send the other one away where the two are not to meet."""
        if self.offload == "none":
            return
        for name, module in self.parts.items():
            streamed = name == "network" and self.offload == "layers"
            if name != part and not streamed:
                module.to(HOST)
        if not (part == "network" and self.offload == "layers"):
            empty_cache()
            self.parts[part].to(self.device)

    def rest(self, pinned: bool) -> bool:
        """Move what is on the device to host memory; pinned, it comes back faster and is not swapped out. True then."""
        self.resting = True  # first: after a failure on the way `wake` brings everything back
        for name, module in self.parts.items():
            if not (name == "network" and self.offload == "layers"):  # the hooks have its weights on the host
                to_host(module, pinned)
        empty_cache()
        return self.resting

    def wake(self) -> None:
        """Move everything to the device where it stays there; parts that take turns come when they are `ready`."""
        if self.resting and self.offload == "none":
            for module in self.parts.values():
                module.to(self.device, non_blocking=True)
        self.resting = False

    def relieve(self) -> str | None:
        """After out of memory with everything else at its least: what was moved away, or None where nothing is left to move."""
        following = OFFLOADS.index(self.offload) + 1
        if self.device.type == "cpu" or following == len(OFFLOADS):
            return None
        self._take(OFFLOADS[following])
        self.ready("network")
        return f"weights {WHERE[self.offload]}"

    def _take(self, offload: str) -> None:
        if offload == "layers":
            self.parts["network"].to(HOST)
            stream(self.parts["network"], self.device)
        self.offload = offload
        free_memory()


def to_host(module: nn.Module, pinned: bool = False) -> None:
    """Move a module's weights to host memory, pinned as far as the system lets them be."""
    module.to(HOST)
    if pinned:
        try:
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.pin_memory()
        except RuntimeError as error:
            log.warning("weights stay in host memory that is not pinned (%s)", str(error).split("\n")[0])


def stream(module: nn.Module, device: torch.device) -> None:
    """Let each layer fetch its weights when it runs and give them back after, the next one's while it works (diffusers)."""
    with quiet_imports():
        from diffusers.hooks import apply_group_offloading
    streams = device.type == "cuda"
    apply_group_offloading(
        module, onload_device=device, offload_device=HOST, offload_type="leaf_level", use_stream=streams, record_stream=streams
    )
