"""The facts of a device that a plan depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device to plan for: one of this machine, or one that the user describes for another machine."""

    name: str
    """The name that the driver reports, or a description; calibrations are stored under it."""
    kind: str
    """'cuda' or 'cpu'."""
    budget_bytes: int
    """All that the process may hold on the device; on a CPU, what it may use beyond libraries and weights."""
    flops: float
    """The sustained rate that plans assume, in FLOP/s."""
    bf16: bool
    """Whether the device multiplies bfloat16 in hardware."""
    elsewhere: bool = False
    """Whether the device is only described and not in this machine."""
    most_bytes: int = 0
    """How far a default budget may grow; 0 if the user gave the budget."""
    ram_bytes: int = 0
    """What the whole process may hold in host memory; 0 if unset."""
    attention_flops: float = 0.0
    """The sustained rate of attention in FLOP/s; 0 if it was not measured on its own."""
    call_seconds: float = 0.0
    """The fixed time to start one evaluation of the network, whatever its size."""
    copy_bytes_per_second: float = 12e9
    """The bandwidth between host memory and the device."""
    slack: float = 0.0
    """What the allocator holds beyond the bytes in use, as a share of them."""
