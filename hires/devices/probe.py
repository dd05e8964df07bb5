"""Finds the devices of this machine and reads their facts through torch."""

from __future__ import annotations

import torch

from hires.devices.machines import CARD_CALL_SECONDS, COPY_BYTES_PER_SECOND, host_device
from hires.devices.spec import DeviceSpec
from hires.errors import RequestError

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CARD_SLACK = 0.94  # share of the free memory that plans may use; the rest covers rounding and the context


def choose_device(name: str) -> torch.device:
    """The torch device of 'auto', 'cpu' or 'cuda:N'; RequestError if this machine lacks it."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RequestError(f"device {name!r}: give auto, cpu or cuda:0") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise RequestError(f"device {name!r}: only cpu and cuda are supported; give auto, cpu or cuda:0")
    if not torch.cuda.is_available():
        raise RequestError(f"device {name!r}: torch sees no CUDA device here; use `device` cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; the first is cuda:0")
    return torch.device("cuda", device.index or 0)


def probe(device: torch.device, budget_bytes: int | None = None, ram_bytes: int = 0, own_bytes: int = 0) -> DeviceSpec:
    """The facts of a device that plans need.

    Args:
        device: a device of this machine.
        budget_bytes: replaces the free memory as budget; on a card never more than is free.
        ram_bytes: what the whole process may hold in host memory; 0 if unset.
        own_bytes: of models that this process keeps there and lets go when a plan needs the room; they count as free.
    """
    if device.type == "cpu":
        return host_device(budget_bytes, ram_bytes, own_bytes)
    facts = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    usable = int((free + own_bytes) * CARD_SLACK)
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
