"""Loading: networks from a model folder, through diffusers and transformers, to a device and dtype. ModelError says why not."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hires.errors import ModelError
from hires.specs import read_json, weight_files


@contextlib.contextmanager
def quiet_imports() -> Iterator[list[str]]:
    """Keep libraries' import-time warnings and log lines from the user; the list holds them when the block is left.

    Only while the block runs: afterwards the libraries log as they did, or as they set themselves up meanwhile.
    """
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(f"{record.name}: {record.getMessage().strip()}")

    keep, stderr = Keep(), io.StringIO()
    named = [logging.getLogger(name) for name in ("xformers", "diffusers", "transformers", "torch")]
    before = [(log, log.propagate, set(log.handlers)) for log in named]
    for log in named:
        log.propagate = False
        log.addHandler(keep)
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(stderr):
            warnings.simplefilter("default")
            yield said
        said += [f"{w.category.__name__}: {w.message}" for w in caught]
        said += [line for line in stderr.getvalue().splitlines() if line.strip()]
    finally:
        for log, propagate, handlers in before:
            log.removeHandler(keep)
            own = [handler for handler in log.handlers if handler not in handlers]
            log.propagate = propagate if not own else log.propagate
            for handler in own:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                    handler.setStream(sys.stderr)


def load_unet(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """An SDXL-type UNet from `folder/unet`, in eval mode."""
    with quiet_imports():
        from diffusers import UNet2DConditionModel
    return _load_diffusers(UNet2DConditionModel, folder / "unet", dtype, device)


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The autoencoder of a model folder, from `folder/vae`."""
    return load_autoencoder(folder / "vae", dtype, device)


def load_autoencoder(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """An AutoencoderKL or AutoencoderTiny from its own folder, as its config says, in eval mode."""
    with quiet_imports():
        from diffusers import AutoencoderKL, AutoencoderTiny
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    name = read_json(folder / "config.json").get("_class_name", "AutoencoderKL")
    if name not in kinds:
        raise ModelError(f"{folder}: {name} is not known; an AutoencoderKL or AutoencoderTiny is needed")
    return _load_diffusers(kinds[name], folder, dtype, device)


def _load_diffusers(kind: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Build from the config on no memory, then take the weights over key by key; every key must fit."""
    state = read_weights(folder)
    with torch.device("meta"):
        module: nn.Module = kind.from_config(kind.load_config(folder))
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise ModelError(
            f"{folder}: the weights do not fit the config: {len(missing)} missing (such as {missing[:1]}), "
            f"{len(extra)} unknown (such as {extra[:1]}); download the model again"
        )
    wrong = [key for key in wanted if wanted[key].shape != state[key].shape]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, config says {tuple(wanted[wrong[0]].shape)}"
        raise ModelError(f"{folder}: {wrong[0]} has shape {shapes}; download the model again")
    module.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    return module.eval().requires_grad_(False)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component's safetensors files, the fp16 variant where there is one."""
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder}: holds no .safetensors weights; download the model again")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); the file is damaged or cut short, download it again") from None
    return state
