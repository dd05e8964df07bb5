"""Maps the tensors of a file, and reads none: safetensors by its library, torch's and ggml's files by their headers.

No code of a file runs: a pickle was walked by the header's reader, and only the values are mapped here.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hires.checkpoints.headers import Header, Packing, TensorInfo, read_header
from hires.errors import ModelError
from hires.models.storage.bitsandbytes import four_bit, int8
from hires.models.storage.fp8 import scaled
from hires.models.storage.ggml import dequantised
from hires.models.storage.packed import Packed, widened

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names start with `prefix`, whole names, on the CPU and mapped; packed ones widened."""
    return {name: widened(value) for name, value in stored_tensors(path, prefix).items()}


def stored_tensors(path: Path, prefix: str = "") -> dict[str, Tensor | Packed]:
    """The same with packed weights as they are, to be widened one by one."""
    header = read_header(path)
    raw = _mapped(header) if header.places else _safetensors(path)
    return {
        name: _packed(header, name, header.packed[name], raw) if name in header.packed else raw[name]
        for name in header.tensors
        if name.startswith(prefix)
    }


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); the file is damaged or cut short, download it again") from None


def _mapped(header: Header) -> dict[str, Tensor]:
    """The tensors of a file that is not a .safetensors; changes to them are not written to it."""
    with header.path.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _view(memory, header, name, info) for name, info in header.tensors.items()}


def _view(memory: mmap.mmap, header: Header, name: str, info: TensorInfo) -> Tensor:
    """One tensor over the file's memory; of a packed one its bytes."""
    place = header.places[name]
    if name in header.packed and info.stored is not None:
        return torch.frombuffer(memory, dtype=torch.uint8, count=info.stored, offset=place.offset)
    dtype = DTYPES[info.dtype]
    if not info.count:
        return torch.empty(info.shape, dtype=dtype)
    stride = place.stride or _in_order(info.shape)
    reach = 1 + sum((side - 1) * step for side, step in zip(info.shape, stride, strict=True))
    if place.offset % dtype.itemsize:  # an old file: read, for values must lie at multiples of their size
        raw = bytearray(memory[place.offset : place.offset + reach * dtype.itemsize])
        return torch.frombuffer(raw, dtype=dtype).as_strided(info.shape, stride)
    return torch.frombuffer(memory, dtype=dtype, count=reach, offset=place.offset).as_strided(info.shape, stride)


def _in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor that lies in order."""
    stride = [1]
    for side in reversed(shape[1:]):
        stride.append(stride[-1] * side)
    return tuple(reversed(stride))[-len(shape) :] if shape else ()


def _packed(header: Header, name: str, packing: Packing, raw: Mapping[str, Tensor]) -> Packed:
    """A packed weight. `raw` is kept by it, so that the file stays mapped."""
    shape = header.tensors[name].shape
    parts = {role: raw[stored] for role, stored in packing.parts.items()}
    if packing.kind == "fp8":
        return Packed(shape, lambda: scaled(parts["codes"], parts["scale"]))
    if packing.kind == "int8":
        return Packed(shape, lambda: int8(parts["codes"], parts["scale"]))
    if packing.kind == "gguf":
        return Packed(shape, lambda: dequantised(parts["codes"], int(packing.values["type"]), shape))
    return Packed(shape, lambda: four_bit(parts, packing.values, shape))
