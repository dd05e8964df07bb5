"""Loads networks and autoencoders of any layout onto a device.

Files are mapped, not read: each tensor goes from the file to its place, through its LoRAs where it has any.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hires._imports import quiet_imports
from hires.checkpoints.containers.config_limits import LAYERS, MOST_LAYERS, SIDES, check_layers
from hires.checkpoints.detect_file import Finding, identify_file
from hires.checkpoints.detect_folder import read_json
from hires.checkpoints.families import UNetShape
from hires.checkpoints.headers import folder_tensors, weight_files
from hires.checkpoints.locate import missing
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import UNET_FILES, network_config, vae_config_of
from hires.errors import ModelError
from hires.models.adapters.change import Change
from hires.models.adapters.lora import merged, network_layers
from hires.models.state_dicts import pixart_state, unet_names, unet_state, vae_state
from hires.models.storage.layers import described_errors, packable, packed_layers, put, without_weight
from hires.models.storage.packed import Packed, widened
from hires.models.storage.reading import stored_tensors
from hires.options.lora import LoraRef
from hires.tiling.retry import is_out_of_memory
from hires.units import Json

log = logging.getLogger(__name__)

LISTED = LAYERS | SIDES | {"only_cross_attention"}
"""What a config may give for each level of a network."""
State = dict[str, Tensor | Packed]
"""Tensors by the names of a module, packed ones to be widened as they are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a module's weights go, and as what."""

    device: torch.device
    dtype: torch.dtype
    """The type that computes."""
    storage: str | None = None
    """What linear layers and convolutions keep their weights in: int8, fp8 or nf4; None for `dtype`."""


def load_network(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    loras: Sequence[LoraRef] = (),
    storage: str | None = None,
) -> nn.Module:
    """The UNet (diffusers' UNet2DConditionModel) or PixArtTransformer2DModel of a model, in eval mode.

    `loras` are merged in float32 before the cast, or before weights are packed as `storage` says. PixArt's size conditions are
    as its keys say; its KV compression is not attached: see `read_kv_compression`.
    """
    path, module = spec.parts["network"].path, empty_network(spec)
    assert path is not None
    state = network_state(spec, module.state_dict())
    home = Home(device=device, dtype=dtype, storage=storage)
    return take_weights(module, state, path, home, network_layers(loras, state.keys(), spec))


def empty_network(spec: ModelSpec) -> nn.Module:
    """The network of a model on no memory, without its weights."""
    with quiet_imports():
        from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
    kind = UNet2DConditionModel if spec.facts.network == "unet" else PixArtTransformer2DModel
    part = spec.parts["network"]
    assert part.path is not None
    tensors = len(folder_tensors(part.path)) if part.layout == "diffusers" else MOST_LAYERS  # else its shapes are the config
    return build(kind, network_config(_found(spec), spec.facts), part.path, tensors)


def network_state(spec: ModelSpec, names: Iterable[str] | None = None) -> State:
    """The network's tensors under diffusers' names, mapped and not read.

    names: those of the module's tensors where it is at hand; without, they are made anew.
    """
    part = spec.parts["network"]
    assert part.path is not None
    if part.layout in UNET_FILES:
        assert isinstance(spec.network, UNetShape)
        tensors = empty_network(spec).state_dict() if names is None else names
        return unet_state(part.path, part.prefix, unet_names(tensors, spec.network.resnets, part.layout))
    return pixart_state(part.path, part.prefix)[0] if part.layout == "pixart" else read_weights(part.path)


def remerge_network(network: nn.Module, spec: ModelSpec, before: Sequence[LoraRef], loras: Sequence[LoraRef]) -> nn.Module:
    """The network that holds the LoRAs `before` with others instead, as if it had been loaded with these, bit for bit."""
    inside = [name for name, _ in network.named_parameters() if not name.endswith((".codes", ".scale"))]
    state = network_state(spec, [*inside, *(name for name, _ in packed_layers(network))])
    touched = network_layers(before, state.keys(), spec).keys()
    merge_anew(network, state, touched, network_layers(loras, state.keys(), spec))
    return network


def merge_anew(
    module: nn.Module, state: Mapping[str, Tensor | Packed], touched: Collection[str], layers: Mapping[str, Sequence[Change]]
) -> None:
    """Replace the weights of a module that LoRAs were merged into, and those that others go into, from those of its file."""
    weights, packed = dict(module.named_parameters()), dict(packed_layers(module))
    with torch.no_grad():
        for name in {*touched, *layers}:
            value = merged(widened(state[name]), layers.get(name, ()))
            if name in packed:
                packed[name].replace(value)
            else:
                weights[name].copy_(value.to(weights[name].dtype))


def read_kv_compression(spec: ModelSpec) -> dict[int, dict[str, Tensor]]:
    """PixArt's KV-compression tensors per block that has them, mapped from the file as they are.

    'sr.weight' (C, 1, r, r), 'sr.bias', 'norm.weight', 'norm.bias' (C). Empty for other models.
    """
    part = spec.parts["network"]
    if part.layout != "pixart" or part.path is None:
        return {}
    return pixart_state(part.path, part.prefix)[1]


def load_vae(spec: ModelSpec, dtype: torch.dtype, device: torch.device, storage: str | None = None) -> nn.Module:
    """The autoencoder of a model, from its folder, its single file, or wherever its part was found."""
    home = Home(device=device, dtype=dtype, storage=storage)
    part = spec.parts["vae"]
    if part.layout == "missing" or part.path is None:
        raise missing([part], spec.facts)
    if part.layout == "diffusers":
        return _autoencoder(part.path, home)
    with quiet_imports():
        from diffusers import AutoencoderKL
    config = vae_config_of(part, spec.facts)
    state: State = {**vae_state(part.path, part.prefix, config, part.layout)}
    return take_weights(build(AutoencoderKL, config, part.path, len(state)), state, part.path, home)


def load_autoencoder(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """An AutoencoderKL or AutoencoderTiny from its own folder, as its config says, in eval mode."""
    return _autoencoder(folder, Home(device=device, dtype=dtype))


def _autoencoder(folder: Path, home: Home) -> nn.Module:
    with quiet_imports():
        from diffusers import AutoencoderKL, AutoencoderTiny
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    config = read_json(folder / "config.json")
    name = str(config.get("_class_name", "AutoencoderKL"))
    if name not in kinds:
        raise ModelError(f"{folder}: {name} is not known; an AutoencoderKL or AutoencoderTiny is needed")
    state = read_weights(folder)
    return take_weights(build(kinds[name], config, folder, len(state)), state, folder, home)


def _found(spec: ModelSpec) -> Finding:
    """What the network's own file or folder says, for its config."""
    part = spec.parts["network"]
    assert part.path is not None
    if part.layout != "diffusers":
        return identify_file(part.path, None if part.layout in UNET_FILES else spec.family)
    conditions = spec.facts.size_conditions == "pixart" if spec.facts.network == "pixart" else None
    return Finding(path=spec.path, kind="model", family=spec.family, layout="diffusers", why=(), size_conditions=conditions)


def build(kind: Any, config: Json, where: Path, tensors: int) -> nn.Module:
    """A module of diffusers from its config, on no memory.

    where: the file or folder it is of, for messages. tensors: how many its weights are. ModelError for a config that the class
    cannot be built by.
    """
    try:
        check_layers(config, tensors)
        _check_kinds(kind, config)
        with torch.device("meta"), quiet_imports():
            module: nn.Module = kind.from_config(dict(config))
    except Exception as error:  # what a class of diffusers makes of an odd value is anything
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
        raise ModelError(f"{where}: its config cannot be used ({reason}); download the model again") from error
    return module


def _check_kinds(kind: Any, config: Json) -> None:
    """ValueError for a value of another kind than the class takes by default: a number, a word, yes or no."""
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        value, default = config.get(name), parameter.default
        if name not in config or default is None or default is inspect.Parameter.empty:
            continue
        if isinstance(value, list | tuple) and (name in LISTED or not isinstance(default, float | int | str)):
            continue
        if value is None and (name in LISTED or not isinstance(default, float)):
            continue
        number = isinstance(default, int | float) and not isinstance(default, bool)
        fits = isinstance(value, int | float) and not isinstance(value, bool) if number else isinstance(value, type(default))
        if not fits:
            raise ValueError(f"{name} {str(value)[:60]!r}, and such as {default!r} is needed")


def take_weights(
    module: nn.Module,
    state: State,
    where: Path,
    home: Home,
    layers: Mapping[str, Sequence[Change]] | None = None,
) -> nn.Module:
    """Give a module on the meta device its weights, tensor by tensor; every key and shape must fit. `state` is emptied.

    Packed ones are packed in host memory: no more than one of them is there as a whole. ModelError where one is not finite.
    """
    wanted = module.state_dict()
    absent, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if absent or extra:
        raise ModelError(
            f"{where}: the weights do not fit the config: {len(absent)} missing (such as {absent[:1]}), "
            f"{len(extra)} unknown (such as {extra[:1]}); incomplete, or of a layout that hires does not know"
        )
    wrong = [key for key in wanted if tuple(wanted[key].shape) != tuple(state[key].shape)]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, config says {tuple(wanted[wrong[0]].shape)}"
        raise ModelError(f"{where}: {wrong[0]} has shape {shapes}; damaged, or of a layout that hires does not know")
    placed, to_pack = {}, packable(module) if home.storage else set()
    for key in wanted:
        value = merged(widened(state.pop(key)), (layers or {}).get(key, ()))
        if key in to_pack:
            _pack(module, key, value, where, home)
        else:
            placed[key] = value.to(home.device, home.dtype)
    module.load_state_dict(placed, assign=True, strict=home.storage is None)
    fill_buffers(module, home.device)
    if home.storage is not None:
        log.info("%s of %s in %s: %s", type(module).__name__, where, home.storage, described_errors(module))
    return module.eval().requires_grad_(False)


def _pack(module: nn.Module, key: str, value: Tensor, where: Path, home: Home) -> None:
    """Put a packed layer with this weight in the place of one without. ModelError for NaN or infinity."""
    assert home.storage is not None
    name = key.removesuffix(".weight")
    layer = without_weight(module.get_submodule(name))
    try:
        layer.hold(value, home.storage, home.dtype, home.device)
    except ValueError as error:
        raise ModelError(
            f"{where}: {key} {error}, which {home.storage} cannot hold; leave `weights` out, or give another file"
        ) from None
    put(module, name, layer)


def fill_buffers(module: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no file holds: position ids of CLIP, the sine table of a patch embedding."""
    for name, buffer in list(module.named_buffers()):
        if not buffer.is_meta:
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf == "position_ids":
            value = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
        elif leaf == "pos_embed":
            value = _sine_table(module.config).to(device)
        else:
            raise ModelError(f"{type(module).__name__} has a buffer {name} that no file gives; this version of it is not known")
        owner.register_buffer(leaf, value, persistent=False)


def _sine_table(config: Any) -> Tensor:
    """The position embedding of the size that a PixArt transformer was trained at, (1, patches, width) float32."""
    with quiet_imports():
        from diffusers.models.embeddings import PatchEmbed
    side, width = config.sample_size, config.num_attention_heads * config.attention_head_dim
    scale = config.interpolation_scale if config.interpolation_scale is not None else max(side // 64, 1)
    table: Tensor = PatchEmbed(
        height=side, width=side, patch_size=config.patch_size, in_channels=1, embed_dim=width, interpolation_scale=scale
    ).pos_embed
    return table


def read_weights(folder: Path) -> State:
    """All tensors of a component's safetensors files, the fp16 variant where there is one, mapped and not read."""
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder}: holds no .safetensors weights; download the model again")
    state: State = {}
    for file in files:
        state |= stored_tensors(file)
    return state
