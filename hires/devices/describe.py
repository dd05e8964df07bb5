"""Chooses the device of a request: probed here, or described for another machine."""

from __future__ import annotations

from pathlib import Path

from hires.devices import calibration, machines
from hires.devices.calibration import calibrated
from hires.devices.spec import DeviceSpec
from hires.units import parse_bytes


def describe_device(device: str, budget_bytes: int | None, ram_bytes: int | None = None, own_bytes: int = 0) -> DeviceSpec:
    """The device to plan for; own_bytes as in `probe`. Imports torch only if this machine has a card to look at."""
    known = calibration.load(calibration.cache_folder())
    if device == "auto" and budget_bytes is not None:
        return machines.described_card(budget_bytes, ram_bytes or 0)
    if device == "cpu" or (device == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))):
        return calibrated(machines.host_device(budget_bytes, ram_bytes or 0, own_bytes), known)
    from hires.devices.probe import choose_device, probe

    return calibrated(probe(choose_device(device), budget_bytes, ram_bytes or 0, own_bytes), known)


def budget_of(vram: str | int | None) -> int | None:
    """The budget in bytes; None, which stands for all free memory, if unset."""
    return None if vram is None else parse_bytes(str(vram))
