"""Reads the header of a .gguf (ggml's container, versions 2 and 3): UNets quantised by ComfyUI-GGUF or stable-diffusion.cpp."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hires.checkpoints.containers.tensors import DAMAGED, Header, Packing, Place, TensorInfo
from hires.errors import ModelError

NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""How the kinds of metadata that are one number are unpacked."""
TEXT, LIST = 8, 9
ALIGNMENT = 32
MOST = 2**20
"""More entries than any file of a network has: a length beyond it is damage."""
PLAIN = {0: "F32", 1: "F16", 28: "F64", 30: "BF16"}
BLOCKS = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
}
"""ggml's quantised types by number: name, values in a block, bytes of a block."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
ARCHITECTURES = {
    "flux": "Flux",
    "sd3": "Stable Diffusion 3",
    "aura": "AuraFlow",
    "ltxv": "LTX-Video",
    "hyvid": "HunyuanVideo",
    "wan": "Wan",
    "lumina2": "Lumina 2 or Z-Image",
    "qwen_image": "Qwen-Image",
    "hidream": "HiDream",
    "cosmos": "Cosmos",
    "t5": "a T5 text encoder",
    "t5encoder": "a T5 text encoder",
    "llama": "a language model",
    "qwen2vl": "a language model",
    "clip": "a CLIP encoder",
}
RUNNING = ("sdxl", "sd1", "pig", "")
"""Architectures whose keys decide; none is what stable-diffusion.cpp writes."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file."""

    shape: tuple[int, ...]
    kind: int
    offset: int


def gguf_header(path: Path) -> Header:
    """The header of a .gguf. ModelError for one of another architecture, cut short, or with types that are not read."""
    try:
        with path.open("rb") as stream:
            stream.read(4)
            version, count, pairs = struct.unpack("<IQQ", stream.read(20))
            if version not in (2, 3) or max(count, pairs) > MOST:
                raise ValueError(f"version {version}, {count} tensors")
            facts = {_text(stream): _value(stream) for _ in range(pairs)}
            entries = dict(_entry(stream) for _ in range(count))
            step = int(str(facts.get("general.alignment", ALIGNMENT)))
            start = -(-stream.tell() // step) * step
    except (*DAMAGED, struct.error, MemoryError) as error:
        raise ModelError(f"{path}: no whole .gguf ({error}); damaged or cut short, download it again") from None
    _check_architecture(path, str(facts.get("general.architecture", "")))
    return _header(path, entries, facts, start)


def _check_architecture(path: Path, architecture: str) -> None:
    if architecture not in RUNNING:
        name = ARCHITECTURES.get(architecture, architecture)
        raise ModelError(
            f"{path}: {name} (general.architecture {architecture}) is not supported; give a .gguf of SDXL or Stable Diffusion "
            f"1.5, or run it in ComfyUI with the GGUF nodes"
        )


def _header(path: Path, entries: dict[str, _Entry], facts: dict[str, object], start: int) -> Header:
    size, tensors, places, packed = path.stat().st_size, {}, {}, {}
    for name, entry in entries.items():
        stored = _stored_bytes(path, name, entry)
        if start + entry.offset + stored > size:
            raise ModelError(f"{path}: {name} ends beyond the file's {size:,} bytes; cut short, download it again")
        given = facts.get(f"{ORIGINAL_SHAPE}{name}")
        shape = tuple(given) if isinstance(given, list) else entry.shape
        if not _is_shape(shape) or math.prod(shape) != math.prod(entry.shape):
            raise ModelError(f"{path}: {name} is stored as {entry.shape} for {shape}; damaged, download it again")
        places[name] = Place(offset=start + entry.offset, stride=())
        dtype = PLAIN.get(entry.kind) or BLOCKS[entry.kind][0]
        tensors[name] = TensorInfo(shape=shape, dtype=dtype, stored=stored)
        if entry.kind in BLOCKS:
            packed[name] = Packing(kind="gguf", parts={"codes": name}, values={"type": entry.kind, "bytes": stored})
    kinds = sorted({tensors[name].dtype for name in packed})
    metadata = {name: value for name, value in facts.items() if isinstance(value, str)}
    storage = f"GGUF {', '.join(kinds)}" if kinds else "GGUF"
    return Header(path=path, tensors=tensors, metadata=metadata, places=places, packed=packed, storage=storage)


def _is_shape(sides: tuple[object, ...]) -> bool:
    return all(type(side) is int and side >= 0 for side in sides)


def _stored_bytes(path: Path, name: str, entry: _Entry) -> int:
    """The bytes of a tensor. ModelError for a type that is not read."""
    count = math.prod(entry.shape)
    if entry.kind in PLAIN:
        return count * {"F64": 8, "F32": 4}.get(PLAIN[entry.kind], 2)
    if entry.kind not in BLOCKS:
        known = ", ".join(kind for kind, _, _ in BLOCKS.values())
        raise ModelError(f"{path}: {name} is of ggml's type {entry.kind}, which is not read; give a file of {known}")
    kind, values, size = BLOCKS[entry.kind]
    if count % values or not count:
        raise ModelError(f"{path}: {name} of {entry.shape} does not divide into {kind}'s blocks of {values}; download it again")
    return count // values * size


def _number(stream: BinaryIO, code: str) -> int:
    return int(struct.unpack(code, stream.read(struct.calcsize(code)))[0])


def _text(stream: BinaryIO) -> str:
    length = _number(stream, "<Q")
    raw = stream.read(length) if length <= MOST else b""
    if len(raw) != length:
        raise ValueError("a text beyond the file's end")
    return raw.decode()


def _value(stream: BinaryIO, kind: int | None = None) -> object:
    """A value of the metadata."""
    kind = _number(stream, "<I") if kind is None else kind
    if kind == TEXT:
        return _text(stream)
    if kind != LIST:
        return struct.unpack(NUMBERS[kind], stream.read(struct.calcsize(NUMBERS[kind])))[0]
    inner, count = _number(stream, "<I"), _number(stream, "<Q")
    if count > 16 * MOST:
        raise ValueError(f"a list of {count}")
    return [_value(stream, inner) for _ in range(count)]


def _entry(stream: BinaryIO) -> tuple[str, _Entry]:
    name, dims = _text(stream), _number(stream, "<I")
    if dims > 8:
        raise ValueError(f"{name} of {dims} axes")
    sides = [_number(stream, "<Q") for _ in range(dims)]
    return name, _Entry(tuple(reversed(sides)), _number(stream, "<I"), _number(stream, "<Q"))
