"""Where the text encoders run, in which number type, and what they take. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hires.checkpoints.model import ModelSpec
from hires.devices import machines
from hires.devices.spec import DeviceSpec
from hires.errors import BudgetError
from hires.planning.costs.network_memory import text_live_bytes
from hires.planning.plan import StageCost
from hires.units import BYTES_PER_ELEMENT, gib

TEXTS_AT_ONCE = 8
"""Chunks that go through a CLIP tower together (`prompt_states.AT_ONCE`)."""
LARGE_ENCODER_PARAMS = 10**9  # larger text encoders are checked against free host memory
HOST_SHARE = 0.8  # of the free host memory that large text encoders may fill


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPlan:
    """How the text encoders run: they are loaded, encode both prompts, and are freed."""

    cost: StageCost
    on_host: bool
    """Whether they run on the CPU because the card has no room for them."""
    dtype: str
    weight_bytes: int
    """Bytes of their weights in the type that the device would use."""
    host_bytes: int = 0
    """Bytes of their weights in host memory, 0 where those are too few to matter."""


def choose_text(spec: ModelSpec, device: DeviceSpec, dtype: str) -> TextPlan:
    """Run the text encoders on the device if they fit its budget, else on the CPU.

    T5 overflows in fp16 and takes bf16 instead. BudgetError if neither the device nor this machine's memory holds them.
    """
    wanted = "bf16" if "t5" in spec.facts.text and dtype == "fp16" else dtype
    element = BYTES_PER_ELEMENT[wanted]
    flops = 2.0 * spec.text_params * 2 * spec.text_tokens
    weights = spec.text_params * element
    working = text_live_bytes(spec.facts.text, min(2 * spec.prompt_chunks, TEXTS_AT_ONCE), spec.facts.tokens, element)
    on_device = StageCost(stage="text", peak_bytes=weights + working, flops=flops, seconds=flops / device.flops)
    if device.kind != "cpu" and on_device.peak_bytes <= device.budget_bytes:
        return TextPlan(cost=on_device, on_host=False, dtype=wanted, weight_bytes=weights)
    seconds = flops / ((os.cpu_count() or 1) * machines.core_flops())
    on_host = TextPlan(
        cost=replace(on_device, peak_bytes=0, seconds=seconds),
        on_host=device.kind != "cpu",
        dtype="fp32",
        weight_bytes=weights,
    )
    if spec.text_params < LARGE_ENCODER_PARAMS:
        return on_host
    host_dtype = largest_host_dtype(spec, device)
    return replace(on_host, dtype=host_dtype, host_bytes=spec.text_params * BYTES_PER_ELEMENT[host_dtype])


def largest_host_dtype(spec: ModelSpec, device: DeviceSpec) -> str:
    """fp32 if the encoders fit this machine's free memory so, else bf16. BudgetError if neither fits."""
    free = machines.available_host_bytes()
    for dtype in ("fp32", "bf16"):
        if spec.text_params * BYTES_PER_ELEMENT[dtype] <= HOST_SHARE * free:
            return dtype
    if device.elsewhere:  # another machine, whose memory is not known here
        return "bf16"
    raise BudgetError(
        f"text encoders need {gib(spec.text_params * 2)} of host memory in bf16, {gib(free)} are free: close other programs"
    )
