"""Writes files that are whole or not there, and locks their folder.

Each file carries the digest of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hires.errors import OutputError, WriteError
from hires.sampling.conditioning import Conditioning

log = logging.getLogger(__name__)
DIGEST = 32  # bytes before what a file holds
LOCK = "lock"  # marks a folder as a journal, and is locked by the process that works on it
PART = ".part"  # the end of names of files that are not whole yet


def digest(content: bytes) -> bytes:
    """The digest that a file's content is checked by, `DIGEST` bytes."""
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def read_whole(file: Path) -> bytes | None:
    """What a record holds; None where it is not there, or not as it was written."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    payload = content[DIGEST:]
    if len(content) < DIGEST or digest(payload) != content[:DIGEST]:
        log.warning("%s is torn and not trusted", file)
        return None
    return payload


def write_whole(file: Path, content: bytes) -> None:
    """The file whole, or not there. WriteError where the disk refuses."""
    part = file.with_name(f".{file.name}{PART}")
    try:
        with part.open("wb") as opened:
            opened.write(digest(content))
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise refused(file.parent, error) from error


def refused(folder: Path, error: OSError) -> WriteError:
    """The error for a journal that the disk does not take, with the next move."""
    reason = error.strerror or error
    return WriteError(f"journal {folder}: {reason}; make room, or give `journal=None` (nothing can be resumed)")


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def hold(folder: Path) -> IO[str]:
    """The folder made where it is not there, and its lock: an open file that holds it until it is closed or the process ends.

    OutputError where another process holds it, or where the folder is not one of ours; WriteError where the disk refuses.
    """
    while True:
        try:
            folder.mkdir(exist_ok=True)
            opened = _opened(folder)
        except OSError as error:
            raise refused(folder, error) from error
        if opened is None:
            continue  # the process that held it has removed the folder meanwhile
        _lock(opened, folder)
        if _is_there(opened, folder / LOCK):
            return opened
        opened.close()


def _opened(folder: Path) -> IO[str] | None:
    """The lock's file, made in an empty folder only; None where the folder has gone."""
    try:
        if not (folder / LOCK).exists() and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds other things than an unfinished render; move it, or give another `output`")
        return (folder / LOCK).open("a")
    except FileNotFoundError:
        return None


def _lock(opened: IO[str], folder: Path) -> None:
    try:
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        opened.close()
        raise OutputError(f"{folder}: another process renders this; wait for it or give another `output`") from None
    except OSError as error:
        log.warning("%s: this file system has no locks (%s); let no other process render to it", folder, error)


def _is_there(opened: IO[str], file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), file.stat())
    except OSError:
        return False


def tensors(content: bytes | None) -> dict[str, Tensor]:
    """The tensors of a record by name; empty for content that is no record."""
    try:
        held: dict[str, Tensor] = {} if content is None else load(content)
        return held
    except (SafetensorError, ValueError):
        return {}


def record(**values: Tensor) -> bytes:
    """Tensors by name as the content of a record."""
    content: bytes = save({name: value.detach().cpu().contiguous() for name, value in values.items()})
    return content


def packed(texts: Sequence[Conditioning]) -> bytes:
    """Conditions of some prompts as one record; those that hold no more than what the text towers gave."""
    values: dict[str, Tensor] = {}
    for index, text in enumerate(texts):
        for name in ("tokens", "mask", "pooled"):
            value = getattr(text, name)
            if value is not None:
                values[f"{index}.{name}"] = value
        values[f"{index}.cell_px"] = torch.tensor(text.cell_px)
    return record(**values)


def unpacked(content: bytes | None) -> list[Conditioning] | None:
    """The conditions of a record that `packed` made; None where it holds none."""
    held = tensors(content)
    count = sum(name.endswith(".cell_px") for name in held)
    if not count:
        return None
    return [
        Conditioning(
            tokens=held[f"{i}.tokens"],
            mask=held.get(f"{i}.mask"),
            pooled=held.get(f"{i}.pooled"),
            cell_px=int(held[f"{i}.cell_px"]),
        )
        for i in range(count)
    ]
