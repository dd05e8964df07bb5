"""Reads the header of a .safetensors: eight bytes of length, JSON, tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from hires.checkpoints.containers.tensors import DTYPE_BYTES, LARGEST_HEADER, SCALAR_BYTES, Header, TensorInfo, scalar
from hires.errors import ModelError


def safetensors_header(path: Path) -> Header:
    """The header of a .safetensors. ModelError for one that is damaged or cut short."""
    size = path.stat().st_size
    broken = f"{path}: no safetensors header; the file is damaged or cut short, download it again"
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise ModelError(broken)
        try:
            document = json.loads(stream.read(length))
            metadata = _metadata(document.pop("__metadata__", {}))
            tensors = {n: TensorInfo(shape=_shape(e["shape"]), dtype=str(e["dtype"])) for n, e in document.items()}
            offsets = {name: _shape(entry["data_offsets"]) for name, entry in document.items()}
            _check_sizes(tensors, offsets)
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
                scalars[name] = scalar(stream.read(info.nbytes), info.dtype)
    return Header(path=path, tensors=tensors, metadata=metadata, scalars=scalars)


def read_bytes(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """The bytes of small tensors of a .safetensors whose header was read: the JSON that quantisers leave in some."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        document = json.loads(stream.read(length))
        values = {}
        for name in names:
            start, end = document[name]["data_offsets"]
            stream.seek(8 + length + start)
            values[name] = stream.read(end - start)
    return values


def _metadata(value: object) -> dict[str, str]:
    """Texts by name; ValueError for anything else."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("its metadata are no texts by name")
    return value


def _check_sizes(tensors: Mapping[str, TensorInfo], offsets: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError for a tensor whose bytes are not those of its shape; types that are not read have none."""
    for name, info in tensors.items():
        start, end = offsets[name]
        if info.dtype in DTYPE_BYTES and end - start != info.nbytes:
            raise ValueError(f"{name} has {end - start} bytes for {info.shape}")


def _shape(value: object) -> tuple[int, ...]:
    """A list of whole numbers from 0 on; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(side) is int and side >= 0 for side in value):
        raise ValueError(f"{value!r} is no shape")
    return tuple(value)
