"""Reads the header of a file of torch.save: a zip with a pickle, or, before torch 1.6, pickles one after the other."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from hires.checkpoints.containers.pickles import Leaf, Storage, leaves, unpickled
from hires.checkpoints.containers.tensors import (
    DAMAGED,
    DTYPE_BYTES,
    LARGEST_HEADER,
    SCALAR_BYTES,
    Header,
    Place,
    TensorInfo,
    scalar,
)
from hires.errors import ModelError

LOCAL_ENTRY = 30
"""Bytes of a zip entry's own header before its name."""
OLD_MAGIC = 0x1950A86A20F9469CFC6C
"""The number that the first pickle of an old file holds."""
STORED_LENGTH = 8
"""Bytes before the values of a storage in an old file: how many they are."""


def zip_header(path: Path) -> Header:
    """The header of a file of torch.save since 1.6. ModelError for one that is damaged or holds code."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            entries = {entry.filename: entry for entry in archive.infolist()}
            root = next(name for name in entries if name.endswith("/data.pkl") or name == "data.pkl").removesuffix("data.pkl")
            if entries[f"{root}data.pkl"].file_size > LARGEST_HEADER:
                raise ValueError("its data.pkl is far larger than that of a state dict")
            document = unpickled(io.BytesIO(archive.read(f"{root}data.pkl")), path)
            found = dict(leaves(document))
            used = {leaf.storage.key: entries[f"{root}data/{leaf.storage.key}"] for leaf in found.values()}
            starts = {key: _entry_start(raw, entry, path) for key, entry in used.items()}
        sizes = {key: min(entry.file_size, path.stat().st_size - starts[key]) for key, entry in used.items()}
        return _header(path, found, starts, sizes)
    except StopIteration:
        raise ModelError(f"{path}: a zip without data.pkl, no file of torch.save; give a .safetensors or .pth file") from None
    except DAMAGED as error:
        raise ModelError(f"{path}: no whole file of torch.save ({error}); damaged or cut short, download it again") from None


def _entry_start(raw: BinaryIO, entry: zipfile.ZipInfo, path: Path) -> int:
    """Where the values of a zip entry begin."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ModelError(f"{path}: its zip is compressed, as torch.save never writes one; save it with torch.save again")
    raw.seek(entry.header_offset)
    local = raw.read(LOCAL_ENTRY)
    name, extra = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    return entry.header_offset + LOCAL_ENTRY + name + extra


def old_header(path: Path) -> Header:
    """The header of a file of torch.save before 1.6. ModelError for another pickle, a damaged one, or one that holds code."""
    try:
        with path.open("rb") as stream:
            if unpickled(stream, path) != OLD_MAGIC:
                raise ModelError(f"{path}: a pickle that torch.save did not write; give a .safetensors or .ckpt file")
            for _ in ("the version", "the sizes of numbers"):
                unpickled(stream, path)
            storages: dict[str, Storage] = {}
            found = dict(leaves(unpickled(stream, path, storages)))
            keys = unpickled(stream, path)
            starts, at = {}, stream.tell()
            for key in map(str, keys):
                storage = storages[key]
                starts[key] = at + STORED_LENGTH
                at = starts[key] + storage.count * DTYPE_BYTES[storage.dtype]
            end = stream.seek(0, io.SEEK_END)
        sizes = {key: end - start for key, start in starts.items()}
        return _header(path, found, starts, sizes)
    except DAMAGED as error:
        raise ModelError(
            f"{path}: no whole file of torch.save before 1.6 ({error}); damaged or cut short, download it again"
        ) from None


def _header(path: Path, found: Mapping[str, Leaf], starts: Mapping[str, int], sizes: Mapping[str, int]) -> Header:
    """starts, sizes: the first byte and the bytes of each storage. ModelError for a tensor that they do not hold."""
    tensors, places = {}, {}
    for name, leaf in found.items():
        width = DTYPE_BYTES[leaf.storage.dtype]
        if not _is_regular(leaf):
            raise ModelError(f"{path}: {name} has shape {leaf.shape} and strides {leaf.stride}; damaged, download it again")
        need, have = (leaf.offset + _reach(leaf)) * width, sizes.get(leaf.storage.key, 0)
        if have < need:
            raise ModelError(f"{path}: {name} needs {need:,} bytes, the file has {have:,} of it; download it again")
        tensors[name] = TensorInfo(shape=leaf.shape, dtype=leaf.storage.dtype)
        places[name] = Place(offset=starts[leaf.storage.key] + leaf.offset * width, stride=leaf.stride)
    return Header(path=path, tensors=tensors, places=places, scalars=_scalars(path, tensors, places))


def _scalars(path: Path, tensors: Mapping[str, TensorInfo], places: Mapping[str, Place]) -> dict[str, float]:
    """The values of the tensors that hold one."""
    single = {name: info for name, info in tensors.items() if info.count == 1 and info.nbytes <= SCALAR_BYTES}
    values = {}
    with path.open("rb") as stream:
        for name, info in single.items():
            stream.seek(places[name].offset)
            values[name] = scalar(stream.read(info.nbytes), info.dtype)
    return values


def _is_regular(leaf: Leaf) -> bool:
    """Whether shape, strides and offset are whole numbers from 0 on, one stride for each axis."""
    numbers = (*leaf.shape, *leaf.stride, leaf.offset)
    return len(leaf.stride) == len(leaf.shape) and all(type(number) is int and number >= 0 for number in numbers)


def _reach(leaf: Leaf) -> int:
    """How many values of its storage a tensor reaches over, from its first."""
    if not all(leaf.shape):
        return 0
    return 1 + sum((side - 1) * step for side, step in zip(leaf.shape, leaf.stride, strict=True))
