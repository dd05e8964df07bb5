"""The device that a plan is made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device to plan for: probed, or described by the user for a machine that is elsewhere.

    `budget_bytes` is all that the process may hold on the device; on a CPU, what it may work with beyond libraries
    and weights. `flops` is the sustained rate that plans assume, in FLOP/s; `elsewhere`: only described, not in this machine;
    `most_bytes`: what a budget that nobody gave may grow to, 0 for a given one. `ram_bytes`: what the whole process may hold
    in host memory, 0 where nobody said. `attention_flops`: the rate of attention where it is known apart; `call_seconds`: what
    an evaluation of the network takes whatever its size; `copy_bytes_per_second`: between host memory and the device.
    `slack`: what the allocator holds beyond what is in use, as a share of it.
    """

    name: str
    kind: str
    budget_bytes: int
    flops: float
    bf16: bool
    elsewhere: bool = False
    most_bytes: int = 0
    ram_bytes: int = 0
    attention_flops: float = 0.0
    call_seconds: float = 0.0
    copy_bytes_per_second: float = 12e9
    slack: float = 0.0
