"""Measured rates of devices, stored in the user's cache folder.

Plans take their seconds and the allocator's slack from them. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hires.devices.spec import DeviceSpec
from hires.errors import WriteError

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The measured rates of one device."""

    device: str
    """The name of the device, as in `DeviceSpec.name`."""
    flops: float
    """Convolutions, in FLOP/s."""
    attention_flops: float
    """Attention, in FLOP/s."""
    copy_bytes_per_second: float
    """The bandwidth between host memory and the device; 0 where both are the same memory."""
    call_seconds: float
    """The fixed time to start one evaluation of the network."""
    slack: float
    """What the allocator holds beyond the bytes in use, as a share of them."""
    attention_backend: str = "sdpa"
    """The backend that attention was measured with."""

    def __post_init__(self) -> None:
        numbers = (self.flops, self.attention_flops, self.copy_bytes_per_second, self.call_seconds, self.slack)
        if not all(math.isfinite(n) and n >= 0 for n in numbers) or not self.flops:
            raise ValueError(f"rates {numbers}: give finite numbers from 0, and FLOP/s above 0")


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The cache folder of hires: in XDG_CACHE_HOME, or in .cache of the home folder."""
    root = environment.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "hires"


def file_of(folder: Path) -> Path:
    """The calibration file in a cache folder."""
    return folder / "calibration.json"


def load(folder: Path) -> dict[str, Calibration]:
    """All stored calibrations by device name; an unreadable file counts as empty."""
    try:
        document = json.loads(file_of(folder).read_text())
        assert document["schema"] == SCHEMA
        return {name: Calibration(**row) for name, row in document["devices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return {}


def save(folder: Path, measured: Calibration) -> Path:
    """Store the rates of one device beside those of others and return the file.

    WriteError if the folder cannot be written.
    """
    devices = load(folder) | {measured.device: measured}
    document = {"schema": SCHEMA, "devices": {name: asdict(row) for name, row in sorted(devices.items())}}
    path = file_of(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(document, indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f"calibration {path}: {reason}; give XDG_CACHE_HOME a folder that can be written") from error
    return path


def calibrated(device: DeviceSpec, known: Mapping[str, Calibration]) -> DeviceSpec:
    """The device with its measured rates, or unchanged if it was never measured."""
    row = known.get(device.name)
    if row is None:
        return device
    return replace(
        device,
        flops=row.flops,
        attention_flops=row.attention_flops,
        call_seconds=row.call_seconds,
        copy_bytes_per_second=row.copy_bytes_per_second or device.copy_bytes_per_second,
        slack=row.slack,
    )
