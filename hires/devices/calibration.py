"""What a machine was measured to sustain, kept in the user's cache folder: plans' seconds and slack go by it. No torch."""

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
    """Rates of one device, by its name: FLOP/s of convolutions and of attention, bytes per second between host memory and the
    device (0 where it is the same memory), seconds that starting an evaluation takes, and what the allocator holds beyond what
    is in use, as a share of it."""

    device: str
    flops: float
    attention_flops: float
    copy_bytes_per_second: float
    call_seconds: float
    slack: float
    attention_backend: str = "sdpa"

    def __post_init__(self) -> None:
        numbers = (self.flops, self.attention_flops, self.copy_bytes_per_second, self.call_seconds, self.slack)
        if not all(math.isfinite(n) and n >= 0 for n in numbers) or not self.flops:
            raise ValueError(f"no rates: {numbers}")


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the user's caches are: XDG_CACHE_HOME, or .cache in the home folder."""
    given = environment.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "hires"


def file_of(folder: Path) -> Path:
    return folder / "calibration.json"


def load(folder: Path) -> dict[str, Calibration]:
    """Every device that was measured, by name; what cannot be read counts as never measured."""
    try:
        document = json.loads(file_of(folder).read_text())
        assert document["schema"] == SCHEMA
        return {name: Calibration(**row) for name, row in document["devices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return {}


def save(folder: Path, measured: Calibration) -> Path:
    """Keep a device's rates beside those of others. WriteError where the folder cannot be written."""
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
    """A device with its measured rates, if it was measured; the allocator's slack leaves the budget."""
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
