"""What a header says of a file's tensors."""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGEST_HEADER = 2**28
SCALAR_BYTES = 64
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
"""What a damaged file makes the readers raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor that was not read."""

    shape: tuple[int, ...]
    """Of the weight, whatever it is packed into."""
    dtype: str
    """In safetensors' words, such as F16, or the packing's: NF4, Q4_K."""
    stored: int | None = None
    """Its bytes in the file where `dtype` does not tell them."""

    @property
    def count(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.count * DTYPE_BYTES.get(self.dtype, 4) if self.stored is None else self.stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor lies in a file that is not a .safetensors."""

    offset: int
    """The byte of its first value."""
    stride: tuple[int, ...]
    """In values; empty for a tensor that lies in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one weight is made of the tensors that a file stores for it."""

    kind: str
    """fp8, int8, nf4, fp4 or gguf."""
    parts: Mapping[str, str]
    """The stored tensors by their role, such as {'codes': 'x.weight', 'scale': 'x.scale_weight'}."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the file states beside them: block sizes, an offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of one file by name (of nested dicts, joined by dots), its free-text metadata, and the tiny ones' values."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    places: Mapping[str, Place] = field(default_factory=dict)
    """Where the tensors of a .ckpt, .pth or .gguf lie, by the stored names."""
    packed: Mapping[str, Packing] = field(default_factory=dict)
    """The weights of `tensors` that are widened when they are loaded."""
    storage: str = ""
    """How the packed weights are stored, for people, such as 'scaled fp8'; empty where none is."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}


def scalar(raw: bytes, dtype: str) -> float:
    """One little-endian number; nan for a dtype that holds no plain one."""
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if dtype == "F32" and raw:  # the decimal that was meant, not its expansion: .002 and not .00200000009
        return float(f"{struct.unpack('<f', raw)[0]:.7g}")
    code = {"F64": "<d", "F16": "<e", "I64": "<q", "I32": "<i", "U8": "<B"}.get(dtype)
    return float(struct.unpack(code, raw)[0]) if code and raw else math.nan
