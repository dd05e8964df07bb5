"""Unpickles what torch.save wrote without running any code of the file.

Tensors become records of where their values lie. Classes of training tools, which old checkpoints hold beside their tensors,
become inert records; any other global is refused by name.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hires.checkpoints.containers.pickle_limits import check_pickle
from hires.checkpoints.containers.tensors import DTYPE_BYTES
from hires.errors import ModelError

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
    "UntypedStorage": "U8",
}
NUMBER_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
MOST_OBJECTS = 300_000
"""Objects of a file, tensors included."""
INERT_MODULES = (
    *("accelerate", "argparse", "collections", "datetime", "diffusers", "ldm", "lightning", "lightning_fabric"),
    *("lightning_lite", "modules", "numpy", "omegaconf", "pytorch_lightning", "sgm", "torch.nn", "torch.optim"),
    *("transformers", "typing"),
)
"""Roots of the modules whose classes training tools leave in a checkpoint; their records are inert and dropped."""
PLAIN_TYPES = (
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long", "object"),
    *("range", "set", "slice", "str", "tuple", "unicode", "xrange"),
)
INERT_NAMES = (
    ("_codecs", "encode"),
    ("torch", "device"),
    ("torch", "dtype"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
    ("torch", "strided"),
    *((module, name) for module in ("builtins", "__builtin__") for name in PLAIN_TYPES),
)


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of values of one kind."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor: a view of a storage, offset and strides in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Sealed(type):
    """A class that a pickle gives no attributes: what one file set would be there for every later one."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"{cls.__name__}.{name} is set by the file")


class _Dict(collections.OrderedDict[Any, Any], metaclass=_Sealed):
    """An OrderedDict that takes the attributes which torch pickles with a state dict."""


class Inert(metaclass=_Sealed):
    """Stands for an object of a class that is not known: takes whatever the pickle gives it, and does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Drop an entry of a dict."""

    def append(self, value: object) -> None:
        """Drop an entry of a list."""

    def extend(self, values: object) -> None:
        """Drop entries of a list."""

    def add(self, value: object) -> None:
        """Drop an entry of a set."""


class Parameters(Inert):
    """torch's ParameterDict, whose parameters are in its state: an embedding of textual inversion."""


class _Call:
    """A function that a pickle calls and gives no attributes."""

    __slots__ = ()


class _Tensor(_Call):
    """_rebuild_tensor and _rebuild_tensor_v2."""

    __slots__ = ()

    def __call__(
        self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...] = (), *rest: object
    ) -> Leaf:
        """The record of a tensor."""
        return Leaf(storage, offset, tuple(shape), tuple(stride))


class _TypedTensor(_Call):
    """_rebuild_tensor_v3, of a storage of bytes and the type that they are read as: what torch writes for fp8."""

    __slots__ = ()

    def __call__(self, storage: Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> Leaf:
        """The record of a tensor."""
        dtype = rest[2]  # behind requires_grad and the hooks
        typed = Storage(dtype, storage.key, storage.count // DTYPE_BYTES[dtype])
        return Leaf(typed, offset, tuple(shape), tuple(stride))


class _Parameter(_Call):
    """_rebuild_parameter."""

    __slots__ = ()

    def __call__(self, data: Leaf, *rest: object) -> Leaf:
        """The record of the tensor that it holds."""
        return data


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Tensor(),
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_tensor_v3"): _TypedTensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    ("torch.nn.modules.container", "ParameterDict"): Parameters,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): STORAGES["UntypedStorage"],
    **{("torch", name): dtype for name, dtype in (STORAGES | NUMBER_TYPES).items()},
}


class StateDictUnpickler(pickle.Unpickler):
    """Knows what a state dict needs, makes inert records of training tools' classes, and refuses other globals by name."""

    def __init__(self, stream: BinaryIO, path: Path, storages: dict[str, Storage]) -> None:
        super().__init__(stream, encoding="latin1")
        self.path, self.storages = path, storages

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global. ModelError for one that may do anything."""
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        inert = any(module == root or module.startswith(f"{root}.") for root in INERT_MODULES)
        if inert or (module, name) in INERT_NAMES:
            return Inert
        raise ModelError(
            f"{self.path}: holds code ({module}.{name}), more than the tensors of a state dict; not opened. Ask its "
            f"author for a .safetensors file"
        )

    def persistent_load(self, pid: Any) -> Storage:
        """A storage by its id. ValueError for an object of another kind."""
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise ValueError(f"an object of kind {kind!r}")
        return self.storages.setdefault(str(key), Storage(dtype, str(key), int(count)))


def unpickled(stream: BinaryIO, path: Path, storages: dict[str, Storage] | None = None) -> Any:
    """The next object of a stream, with tensors as records of where their values lie.

    storages: gets the runs of values by their keys. ModelError for code; ValueError and the like for damage.
    """
    check_pickle(stream)
    return StateDictUnpickler(stream, path, {} if storages is None else storages).load()


def leaves(value: object) -> Iterator[tuple[str, Leaf]]:
    """The tensors of nested dicts and tuples by their names, joined by dots; A1111's hypernetworks hold pairs.

    ValueError for more objects than `MOST_OBJECTS`: a few dicts, each twice in the next, are endless to walk.
    """
    left = MOST_OBJECTS

    def walk(value: object, name: str) -> Iterator[tuple[str, Leaf]]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {MOST_OBJECTS:,} objects")
        if isinstance(value, Parameters) and isinstance(value.state, dict):
            value = value.state.get("_parameters", value.state)
        if isinstance(value, Leaf):
            yield name, value
        elif isinstance(value, dict | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(inner, f"{name}.{key}" if name else str(key))

    yield from walk(value, "")
