"""Finds weights that a file stores in 8 or 4 bits with scales beside them, and gives them the shapes that they stand for.

ComfyUI's scaled fp8 of both kinds, fp8 scaled by channel or by block, bitsandbytes' NF4, FP4 and int8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from hires.checkpoints.containers.safetensors_files import read_bytes
from hires.checkpoints.containers.tensors import DTYPE_BYTES, Header, Packing, TensorInfo
from hires.errors import ModelError
from hires.units import Json

FP8 = ("F8_E4M3", "F8_E5M2")
BITS = (*FP8, "I8", "U8")
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
UNUSED = ("scale_input", "input_scale", "weight_format")
"""Keys that matter to arithmetic in 8 bits only."""
MARKER, COMFY, METADATA = "scaled_fp8", "comfy_quant", "_quantization_metadata"
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")
NVFP4 = "weight_scale_2"
FOUR_BIT = re.compile(r"(.+\.weight)\.quant_state\.bitsandbytes__(nf4|fp4)")
FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
FOUR_BIT_NUMBERS = {"blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.0}
"""Numbers that a quant_state may hold, and bitsandbytes' own."""
BLOCK = 128
"""The side of a block of fp8 weights that shares a scale."""


@dataclass(slots=True)
class _Found:
    """What was found so far."""

    header: Header
    kinds: set[str] = field(default_factory=set)
    packed: dict[str, Packing] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    """Names that are parts of packed weights or of no use."""

    def take(self, weight: str, packing: Packing, kind: str, shape: tuple[int, ...] | None = None) -> None:
        """Note a packed weight."""
        self.packed[weight], self.shapes[weight] = packing, shape or self.header.tensors[weight].shape
        self.used.update(set(packing.parts.values()) - {weight})
        self.kinds.add(kind)


def unpacked(header: Header) -> Header:
    """The header with its packed weights as what they stand for. ModelError, by name, for a packing that is not read."""
    found, names = _Found(header), header.tensors
    _check_dtypes(header)
    if not any(info.dtype in BITS for info in names.values()):
        return header
    _refuse_nvfp4(header)
    for search in (_four_bit, _int8, _scaled):
        search(found)
    found.used.update(name for name in names if name.rpartition(".")[2] in (*UNUSED, MARKER, COMFY))
    _refuse_unknown(found)
    tensors = {
        name: _logical(found, name, info) if name in found.packed else info
        for name, info in names.items()
        if name not in found.used
    }
    if not found.kinds and any(info.dtype in FP8 for info in tensors.values()):
        found.kinds.add("fp8")
    return replace(header, tensors=tensors, packed=found.packed, storage=", ".join(sorted(found.kinds)))


def _logical(found: _Found, name: str, info: TensorInfo) -> TensorInfo:
    parts = (found.header.tensors[part] for part in found.packed[name].parts.values())
    kind = found.packed[name].kind
    dtype = info.dtype if kind == "fp8" else kind.upper()
    return TensorInfo(shape=found.shapes[name], dtype=dtype, stored=sum(part.nbytes for part in parts))


def _check_dtypes(header: Header) -> None:
    for name, info in header.tensors.items():
        if info.dtype not in DTYPE_BYTES:
            raise ModelError(f"{header.path}: {name} is stored as {info.dtype}, which is not read; {_other_file()}")


def _other_file() -> str:
    return "give the model in fp16, bf16, fp8, NF4, int8 or GGUF"


def _refuse_nvfp4(header: Header) -> None:
    """ModelError for nvfp4, whose block scales are laid out for one kind of card."""
    by_format = {name: kind for name, kind in _comfy_formats(header).items() if kind not in COMFY_FORMATS}
    for name in header.tensors:
        if name.endswith(f".{NVFP4}"):
            by_format[name] = "nvfp4"
    for name, kind in by_format.items():
        raise ModelError(f"{header.path}: {name} is stored as {kind}, which is not read; {_other_file()}")


def _comfy_formats(header: Header) -> dict[str, str]:
    """The format of each layer that ComfyUI's newer convention names, beside the tensors or in the metadata."""
    said = [name for name, info in header.tensors.items() if name.endswith(f".{COMFY}") and info.dtype == "U8"]
    texts = {} if header.places or not said else read_bytes(header.path, said)
    formats = {name.removesuffix(f".{COMFY}"): _format(_json(header, raw, name)) for name, raw in texts.items()}
    stated = header.metadata.get(METADATA)
    if stated:
        layers = _json(header, stated.encode(), METADATA).get("layers", {})
        if not isinstance(layers, dict):
            raise ModelError(f"{header.path}: {METADATA} names no layers; save the file again")
        formats |= {str(name): _format(value) for name, value in layers.items()}
    return formats


def _format(value: object) -> str:
    return str(value.get("format", "")) if isinstance(value, Mapping) else str(value)


def _json(header: Header, raw: bytes, name: str) -> Json:
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{header.path}: {name} is no JSON ({error}); save the file again") from None
    if not isinstance(document, dict):
        raise ModelError(f"{header.path}: {name} is no JSON object; save the file again")
    return document


def _four_bit(found: _Found) -> None:
    """bitsandbytes' NF4 and FP4: two codes in a byte, a scale for each block, the scales themselves in 8 bits or not."""
    header = found.header
    matches = [match for name in header.tensors if (match := FOUR_BIT.fullmatch(name))]
    if matches and header.places:
        raise ModelError(f"{header.path}: {matches[0][0]} in a pickle; give the model as .safetensors")
    texts = read_bytes(header.path, [match[0] for match in matches]) if matches else {}
    for match in matches:
        name, weight, kind = match[0], match[1], match[2]
        state = _json(header, texts[name], name)
        parts = {"codes": weight, "state": name} | {
            part: f"{weight}.{part}" for part in FOUR_BIT_PARTS if f"{weight}.{part}" in header.tensors
        }
        missing = [f"{weight}.{part}" for part in FOUR_BIT_PARTS[:2] if f"{weight}.{part}" not in header.tensors]
        if missing or weight not in header.tensors:
            raise ModelError(f"{header.path}: {name} without {missing or weight}; download it again")
        shape, numbers = _stated(header, name, state)
        _check_counts(header, weight, parts, shape, numbers)
        found.take(weight, Packing(kind=kind, parts=parts, values=numbers), kind.upper(), shape)


def _stated(header: Header, name: str, state: Json) -> tuple[tuple[int, ...], dict[str, float]]:
    """The shape and the numbers of a quant_state. ModelError for such as no weight has."""
    shape, numbers = state.get("shape"), {key: state.get(key, usual) for key, usual in FOUR_BIT_NUMBERS.items()}
    sizes = (numbers["blocksize"], numbers["nested_blocksize"])
    whole = isinstance(shape, list) and bool(shape) and all(type(side) is int and side > 0 for side in (*shape, *sizes))
    offset = numbers["nested_offset"]
    if shape is None or not whole or type(offset) not in (int, float) or not abs(offset) < math.inf:
        raise ModelError(f"{header.path}: {name} states shape {shape} and {numbers}; damaged, download it again")
    return tuple(shape), numbers


def _check_counts(
    header: Header, weight: str, parts: Mapping[str, str], shape: tuple[int, ...], numbers: Mapping[str, float]
) -> None:
    """ModelError where codes, scales or tables are more or fewer than the shape and the block sizes need."""
    values = math.prod(shape)
    blocks = -(-values // int(numbers["blocksize"]))
    needed = {"codes": -(-values // 2), "absmax": blocks, "quant_map": 16}
    nested = header.tensors[parts["absmax"]].dtype == "U8"
    if nested:
        needed |= {"nested_absmax": -(-blocks // int(numbers["nested_blocksize"])), "nested_quant_map": 256}
    for part, count in needed.items():
        have = header.tensors[parts[part]].count if part in parts else 0
        if have != count:
            name = parts.get(part, f"{weight}.{part}")
            raise ModelError(f"{header.path}: {name} holds {have} values, {weight} of {shape} needs {count}; download it again")
    if header.tensors[weight].dtype != "U8" or nested != ("nested_absmax" in parts):
        raise ModelError(f"{header.path}: {weight} or its scales are of another type than bitsandbytes'; {_other_file()}")


def _int8(found: _Found) -> None:
    """bitsandbytes' int8: W = q SCB / 127 for each row."""
    tensors = found.header.tensors
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        if leaf == "SCB" and weight in tensors and tensors[weight].dtype == "I8":
            shape = tensors[weight].shape
            if len(shape) != 2 or tensors[name].count != shape[0]:
                raise ModelError(
                    f"{found.header.path}: {name} of {tensors[name].shape} does not hold a scale for each row of a weight of "
                    f"{shape}; {_other_file()}"
                )
            found.take(weight, Packing(kind="int8", parts={"codes": weight, "scale": name}), "int8")


def _scaled(found: _Found) -> None:
    """fp8 with a scale for the tensor, for each row, or for each block of 128 x 128."""
    tensors = found.header.tensors
    for name in tensors:
        layer, _, leaf = name.rpartition(".")
        weight = f"{layer}.weight"
        if leaf in SCALES and weight in tensors and tensors[weight].dtype in FP8:
            if weight in found.packed:
                other = found.packed[weight].parts["scale"]
                raise ModelError(f"{found.header.path}: {weight} has two scales, {other} and {name}; {_other_file()}")
            if not _fits(tensors[name].shape, tensors[weight].shape):
                raise ModelError(
                    f"{found.header.path}: {name} of {tensors[name].shape} is no scale of a weight of {tensors[weight].shape} "
                    f"that is known; {_other_file()}"
                )
            found.take(weight, Packing(kind="fp8", parts={"codes": weight, "scale": name}), "scaled fp8")


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether it is one number, one for each row, or one for each block."""
    rows = bool(scale and weight) and math.prod(scale) == scale[0] == weight[0]
    blocks = tuple(-(-side // BLOCK) for side in weight)
    return math.prod(scale) == 1 or rows or (len(weight) == 2 and scale == blocks)


def _refuse_unknown(found: _Found) -> None:
    """ModelError for scales of another convention, and for weights of 8 bits without any."""
    header, tensors = found.header, found.header.tensors
    packed = {name for name, info in tensors.items() if name.endswith(".weight") and info.dtype in BITS}
    layers = {name.removesuffix(".weight") for name in packed}
    strange = _first(tensors, lambda name: "scale" in name.rpartition(".")[2] and name.rpartition(".")[0] in layers, found.used)
    if strange:
        raise ModelError(f"{header.path}: {strange} is a scale of a convention that is not read; {_other_file()}")
    bare = _first(packed, lambda name: tensors[name].dtype in ("I8", "U8"), set(found.packed))
    if bare:
        raise ModelError(f"{header.path}: {bare} is stored as {tensors[bare].dtype} without a scale; {_other_file()}")


def _first(names: Iterable[str], test: Callable[[str], bool], known: set[str]) -> str:
    return next((name for name in sorted(names) if name not in known and test(name)), "")
