"""Reads the header of a weights file: names, shapes, dtypes, tiny scalars.

Imports no torch and reads no tensor. The formats are in `containers`; weights that a file packs into 8 or 4 bits have the
shapes that they stand for.
"""

from __future__ import annotations

from pathlib import Path

from hires.checkpoints.containers.gguf_files import gguf_header
from hires.checkpoints.containers.packed import unpacked
from hires.checkpoints.containers.safetensors_files import safetensors_header
from hires.checkpoints.containers.tensors import DAMAGED, Header, Packing, Place, TensorInfo
from hires.checkpoints.containers.torch_files import old_header, zip_header
from hires.errors import ModelError

__all__ = ["DAMAGED", "Header", "Packing", "Place", "TensorInfo", "folder_tensors", "read_header", "weight_files"]


def read_header(path: Path) -> Header:
    """The header of a weights file. ModelError for another file, one that is cut short, or one that holds code."""
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
        if path.suffix == ".safetensors":
            return unpacked(safetensors_header(path))
        if start[:4] == b"PK\x03\x04":
            return unpacked(zip_header(path))
        if start[:4] == b"GGUF":
            return gguf_header(path)
        if start[:1] == b"\x80":
            return unpacked(old_header(path))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    raise ModelError(
        f"{path}: neither safetensors nor a file of torch.save nor GGUF; give a .safetensors, .gguf, .pth, .pt or .ckpt file"
    )


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
