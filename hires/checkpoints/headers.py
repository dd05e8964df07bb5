"""Reads the header of a weights file: names, shapes, dtypes, tiny scalars.

Imports no torch and reads no tensor.

safetensors: eight bytes of length, JSON, tensors. A .pth, .pt, .ckpt or .bin of torch is a zip whose data.pkl is read by an
unpickler that knows what a state dict needs and nothing else.
"""

from __future__ import annotations

import collections
import json
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hires.errors import ModelError

LARGEST_HEADER = 2**28
SCALAR_BYTES = 64
SAFETENSORS_BYTES = {
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
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor that was not read. dtype in safetensors' words, such as 'F16'."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Values in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.count * SAFETENSORS_BYTES.get(self.dtype, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The tensors of one file by name (of nested dicts, joined by dots), its free-text metadata, and the tiny ones' values."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor by name."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a weights file. ModelError for another file, one that is cut short, or one that holds code."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if start[:4] == b"PK\x03\x04":
            return _torch_zip(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    if start[:1] == b"\x80":
        raise ModelError(
            f"{path}: a pickle of torch before 1.6, which may run code when it is opened; open it with torch.load in a place "
            f"you trust and save its state dict again, as .safetensors"
        )
    raise ModelError(f"{path}: neither safetensors nor a file of torch.save; give a .safetensors, .pth, .pt or .ckpt file")


def _safetensors(path: Path) -> Header:
    size = path.stat().st_size
    broken = f"{path}: no safetensors header; the file is damaged or cut short, download it again"
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ModelError(broken)
        try:
            document = json.loads(stream.read(length))
            metadata = document.pop("__metadata__", {})
            tensors = {n: TensorInfo(shape=_shape(e["shape"]), dtype=str(e["dtype"])) for n, e in document.items()}
            offsets = {name: _shape(entry["data_offsets"]) for name, entry in document.items()}
            expected = 8 + length + max((end for _, end in offsets.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ModelError(broken) from None
        if size != expected:
            raise ModelError(
                f"{path}: the header promises {expected:,} bytes, the file has {size:,}; damaged or cut short, "
                f"download it again"
            )
        scalars = {}
        for name, info in tensors.items():
            if info.count == 1 and info.nbytes <= SCALAR_BYTES:
                stream.seek(8 + length + offsets[name][0])
                scalars[name] = _scalar(stream.read(info.nbytes), info.dtype)
    return Header(path=path, tensors=tensors, metadata=metadata, scalars=scalars)


def _shape(value: object) -> tuple[int, ...]:
    """A list of whole numbers from 0 on; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(side) is int and side >= 0 for side in value):
        raise ValueError(f"{value!r} is no shape")
    return tuple(value)


def _scalar(raw: bytes, dtype: str) -> float:
    """One little-endian number; nan for a dtype that holds no plain one."""
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0])
    if dtype == "F32" and raw:  # the decimal that was meant, not its expansion: .002 and not .00200000009
        return float(f"{struct.unpack('<f', raw)[0]:.7g}")
    code = {"F64": "<d", "F16": "<e", "I64": "<q", "I32": "<i", "U8": "<B"}.get(dtype)
    return float(struct.unpack(code, raw)[0]) if code and raw else math.nan


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


class _Dict(collections.OrderedDict[Any, Any]):
    """An OrderedDict that takes the attributes which torch pickles with a state dict."""


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], *rest: object) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape))


def _parameter(data: _Tensor, *rest: object) -> _Tensor:
    return data


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _StateDictUnpickler(pickle.Unpickler):
    """Knows what a state dict needs; refuses any other global by name, so that no code of the file runs."""

    def __init__(self, stream: Any, path: Path) -> None:
        super().__init__(stream)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ModelError(
                f"{self.path}: holds code ({module}.{name}), more than the tensors of a state dict; not opened. Ask its "
                f"author for a .safetensors file"
            )
        return KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, str):
            raise ValueError(f"an object of kind {kind!r}")
        return _Storage(dtype, str(key), int(count))


def _torch_zip(path: Path) -> Header:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            root = next(name for name in entries if name.endswith("/data.pkl") or name == "data.pkl").removesuffix("data.pkl")
            if entries[f"{root}data.pkl"].file_size > LARGEST_HEADER:
                raise ValueError("its data.pkl is far larger than that of a state dict")
            with archive.open(f"{root}data.pkl") as stream:
                document = _StateDictUnpickler(stream, path).load()
        leaves = dict(_walk(document, ""))
        tensors = {name: TensorInfo(shape=t.shape, dtype=t.storage.dtype) for name, t in leaves.items()}
        for name, tensor in leaves.items():
            have = entries[f"{root}data/{tensor.storage.key}"].file_size
            need = (tensor.offset + tensors[name].count) * SAFETENSORS_BYTES[tensor.storage.dtype]
            if have < need:
                raise ModelError(f"{path}: {name} needs {need:,} bytes, the file has {have:,} of it; download it again")
    except StopIteration:
        raise ModelError(f"{path}: a zip without data.pkl, no file of torch.save; give a .safetensors or .pth file") from None
    except DAMAGED as error:
        raise ModelError(f"{path}: no whole file of torch.save ({error}); damaged or cut short, download it again") from None
    return Header(path=path, tensors=tensors)


def _walk(value: object, name: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(value, _Tensor):
        yield name, value
    elif isinstance(value, dict | tuple):  # A1111's hypernetworks hold pairs of state dicts
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _walk(inner, f"{name}.{key}" if name else str(key))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component that would be loaded: the fp16 variant where there is one."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if ".non_ema" not in file.name]
    return [file for file in files if ".fp16" in file.name] or files


def folder_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of all safetensors files of a component, by name."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder):
        tensors |= read_header(file).tensors
    return tensors
