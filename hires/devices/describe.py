"""The device of a request: probed here, or described for a machine elsewhere."""

from __future__ import annotations

from pathlib import Path

from hires.devices import calibration, machines
from hires.devices.calibration import calibrated
from hires.devices.spec import DeviceSpec
from hires.units import parse_bytes


def describe_device(device: str, budget_bytes: int | None, ram_bytes: int | None = None) -> DeviceSpec:
    """The device to plan for. torch is imported only to look at a card that is here."""
    known = calibration.load(calibration.cache_folder())
    if device == "auto" and budget_bytes is not None:
        return machines.described_card(budget_bytes, ram_bytes or 0)
    if device == "cpu" or (device == "auto" and not any(Path("/dev").glob("nvidia[0-9]*"))):
        return calibrated(machines.host_device(budget_bytes, ram_bytes or 0), known)
    from hires.devices.probe import choose_device, probe

    return calibrated(probe(choose_device(device), budget_bytes, ram_bytes or 0), known)


def budget_of(vram: str | int | None) -> int | None:
    """Bytes; None for what is free."""
    return None if vram is None else parse_bytes(str(vram))
