"""What a row of `hires bench` holds, and what all suites share.

Every row has quantiles, rates with their share of the measured peak and of the floor (the larger of FLOPs over the peak rate
and bytes over the peak bandwidth), predicted and measured peak bytes, and a quality.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hires.bench.timing import Timed, timed
from hires.devices.memory import peak_resident_bytes, reset_resident_peak
from hires.devices.probe import probe
from hires.errors import RequestError
from hires.tiling.geometry import Size
from hires.tiling.retry import free_memory
from hires.units import Json, parse_bytes

if TYPE_CHECKING:
    from hires.checkpoints.model import ModelSpec


SUITES = ("attention", "norm", "vae", "denoise", "render", "io", "upscale")
SIZES = {"attention": 1024, "norm": 1024, "vae": 1024, "denoise": 1024, "render": 1024, "io": 4096, "upscale": 1024}
QUICK = {"attention": 128, "norm": 128, "vae": 128, "denoise": 320, "render": 256, "io": 512, "upscale": 96}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement."""

    suite: str
    """One of `SUITES`."""
    case: str
    """What is measured."""
    way: str
    """By which backend, policy or format."""
    size: str
    dtype: str = ""
    taken: Timed = field(default_factory=Timed)
    """Quantiles of its seconds, or why there are none."""
    flops: float | None = None
    """FLOPs of one call; None where they are not counted."""
    moved: float | None = None
    """Bytes that one call reads and writes; None where they are not counted."""
    peak_flops: float | None = None
    """The machine's measured peak rate."""
    peak_bandwidth: float | None = None
    """The machine's measured bytes per second."""
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    measure: str = ""
    """What `quality` is: rms error, max difference to …, PSNR dB to …, seam score, exact."""
    quality: float | None = None

    @property
    def floor_seconds(self) -> float | None:
        """What the machine needs at least for the row's FLOPs and bytes."""
        compute = self.flops / self.peak_flops if self.flops and self.peak_flops else None
        copy = self.moved / self.peak_bandwidth if self.moved and self.peak_bandwidth else None
        floors = [seconds for seconds in (compute, copy) if seconds is not None]
        return max(floors) if floors else None

    def to_json(self) -> Json:
        """Flat JSON values; what is not known is None."""
        p50, floor = self.taken.p50, self.floor_seconds
        rate = self.flops / p50 if self.flops and p50 else None
        return {
            "suite": self.suite,
            "case": self.case,
            "way": self.way,
            "size": self.size,
            "dtype": self.dtype,
            "p20_ms": _milli(self.taken.p20),
            "p50_ms": _milli(p50),
            "p80_ms": _milli(self.taken.p80),
            "repeats": self.taken.repeats,
            "tflop_per_s": None if rate is None else round(rate / 1e12, 5),
            "gb_per_s": round(self.moved / p50 / 1e9, 3) if self.moved and p50 else None,
            "share_of_peak": round(rate / self.peak_flops, 4) if rate and self.peak_flops else None,
            "share_of_floor": round(floor / p50, 4) if floor and p50 else None,
            "predicted_peak_mib": _mebi(self.predicted_peak_bytes),
            "measured_peak_mib": _mebi(self.measured_peak_bytes),
            "measure": self.measure,
            "quality": None if self.quality is None else float(f"{self.quality:.5g}"),
            "state": self.taken.state,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSetup:
    """What all suites share."""

    device: torch.device
    dtype: str = "auto"
    """auto, or a name of `DTYPES`."""
    sizes: tuple[Size, ...] = ()
    """Sizes of pictures; empty for each suite's own."""
    vram: str | None = None
    """A memory budget such as 24GB; None for what is free."""
    model: str = "demo"
    """As in `render`."""
    parts: str | None = None
    """As in `render`."""
    upscaler: str | None = None
    """A network that the suite upscale measures beside Lanczos."""
    quick: bool = False
    """Whether sizes and repeats are few."""

    @property
    def seconds(self) -> float:
        """Seconds spent on each row after its warm-up."""
        return 0.1 if self.quick else 2.0

    @property
    def least(self) -> int:
        """The fewest repeats of a row."""
        return 2 if self.quick else 5

    @property
    def spec(self) -> ModelSpec:
        """The model. ModelError for one that is not known."""
        from hires.checkpoints.spec import load_spec

        return load_spec(self.model, parts=self.parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type that networks run in; without one bf16 on a card, else float32. RequestError for an unknown name."""
        if self.dtype != "auto":
            if self.dtype not in DTYPES:
                raise RequestError(f"dtype {self.dtype}: give auto, {', '.join(DTYPES)}")
            return DTYPES[self.dtype]
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def budget_bytes(self) -> int:
        """Bytes that a measurement may hold on the device."""
        return probe(self.device, None if self.vram is None else parse_bytes(self.vram)).budget_bytes

    def check(self) -> None:
        """RequestError or ModelError for what no suite could use."""
        _ = self.torch_dtype, self.budget_bytes, self.spec

    def of(self, suite: str) -> tuple[Size, ...]:
        """The sizes that a suite runs at."""
        side = (QUICK if self.quick else SIZES)[suite]
        return self.sizes or (Size(side, side),)

    def time(self, run: Callable[[], object]) -> Timed:
        """Quantiles of a call's seconds; an out-of-memory is a state of the result, not an error."""
        with torch.inference_mode():
            return timed(run, self.device, least=self.least, seconds=self.seconds)

    def peak_of(self, run: Callable[[], object]) -> int | None:
        """Bytes beyond what was held before that one call takes: the allocator's on a card, resident ones on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            held = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            with torch.inference_mode():
                run()
            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device)) - held
        before = resident_from_now()
        with torch.inference_mode():
            run()
        return None if before is None else peak_resident_bytes() - before


def resident_from_now() -> int | None:
    """Resident bytes now, after what is free in the heap went back, with the peak starting anew; None where that cannot be."""
    free_memory()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory of the warm-up is used again and nothing is seen
    return peak_resident_bytes() if reset_resident_peak() else None


def name_of(dtype: torch.dtype) -> str:
    """The short name of a type, such as 'bf16'."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)


def _mebi(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 2)


COLUMNS = tuple(Row(suite="", case="", way="", size="").to_json())
