"""The devices that are here: what they are, what is free on them, and how torch calls them."""

from __future__ import annotations

import torch

from hires.devices.machines import CARD_CALL_SECONDS, COPY_BYTES_PER_SECOND, host_device
from hires.devices.spec import DeviceSpec
from hires.errors import RequestError

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CARD_SLACK = 0.94  # of free memory: the allocator's rounding and the context stay outside plans


def choose_device(asked: str) -> torch.device:
    """'auto', 'cpu' or 'cuda:N' as a torch device; RequestError for one that is not here."""
    if asked == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise RequestError(f"--device {asked!r}: give auto, cpu or cuda:0") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise RequestError(f"--device {asked!r}: only cpu and cuda are supported")
    if not torch.cuda.is_available():
        raise RequestError(f"--device {asked!r}: torch sees no CUDA device here; use --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"--device {asked!r}: this machine has {torch.cuda.device_count()}, cuda:0 is the first")
    return torch.device("cuda", device.index or 0)


def probe(device: torch.device, budget_bytes: int | None = None, ram_bytes: int = 0) -> DeviceSpec:
    """The facts of a device that plans need; a given budget replaces the free memory, never more than is free.

    ram_bytes: what the whole process may hold in host memory, 0 where nobody said.
    """
    if device.type == "cpu":
        return host_device(budget_bytes, ram_bytes)
    facts = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    usable = int(free * CARD_SLACK)
    return DeviceSpec(
        name=facts.name,
        kind="cuda",
        budget_bytes=usable if budget_bytes is None else min(budget_bytes, usable),
        flops=facts.multi_processor_count * 1e12 * 0.5,
        bf16=facts.major >= 8,
        ram_bytes=ram_bytes,
        call_seconds=CARD_CALL_SECONDS,
        copy_bytes_per_second=COPY_BYTES_PER_SECOND,
    )
