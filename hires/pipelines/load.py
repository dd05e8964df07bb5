"""Loads models, and opens sessions on them: the only place that loads a network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hires.checkpoints.adapters.embeddings import prompts_of
from hires.checkpoints.families import PixArtShape
from hires.checkpoints.model import ModelSpec
from hires.devices.probe import TORCH_DTYPE
from hires.errors import ModelError
from hires.models.adapters.controlnet import ControlBlock, load_control
from hires.models.attention_processors import add_compression
from hires.models.loading import Home, load_autoencoder, load_network, load_vae, read_kv_compression, remerge_network
from hires.models.offload import HOST
from hires.models.text_encoders import TextEncoders
from hires.options.lora import LoraRef
from hires.options.render import RenderRequest
from hires.pipelines.base import Family, Prompted, Runtime, Session
from hires.pipelines.cosxl import CosXL
from hires.pipelines.cosxl_edit import CosXLEdit
from hires.pipelines.pixart_sigma import PixArtSigma
from hires.planning.costs.weights import storage_of
from hires.planning.plan import MemoryPlan
from hires.prompts.script import Wording, write_script
from hires.sampling.conditioning import Conditioning, SizeCondition
from hires.tiling.halo import HaloVAE, tiled_autoencoder
from hires.tiling.retry import attempt, empty_cache, free_memory, twice

log = logging.getLogger(__name__)


def load_session(
    request: RenderRequest,
    plan: MemoryPlan,
    spec: ModelSpec,
    runtime: Runtime,
    picture: NDArray[np.uint8] | None = None,
) -> Session:
    """A request on a model that is loaded for it alone: the text encoders come and go before the rest is loaded."""
    prompted = prompted_by(request, spec, plan)
    encoders = load_encoders(spec, plan, runtime.device, request.loras)
    texts = encode(encoders, prompted.script.texts)
    del encoders
    empty_cache()
    family = load_family(request, spec, runtime)
    if request.tiny_vae is not None:
        family.tiny = load_tiny(request.tiny_vae, spec, runtime.decode.rung.dtype, runtime.device)
    return prepared(open_session(family, texts, request, runtime, picture), prompted)


def prompted_by(request: RenderRequest, spec: ModelSpec, plan: MemoryPlan) -> Prompted:
    """The texts of a request for the stages of a plan, and the sizes that the network is told. RequestError as `plan`."""
    prompts = prompts_of(request, spec)
    script = write_script(prompts, [(stage.name, stage.taken_steps) for stage in plan.stages])
    size = SizeCondition(original=request.original_size, target=request.target_size, crop=request.crop or (0, 0))
    return Prompted(script=script, size=size)


def prepared(session: Session, prompted: Prompted) -> Session:
    """The session, drawn by these texts; its conditions are those of the script, in order."""
    session.prompted = prompted
    return session


def open_session(
    family: Family,
    texts: Sequence[Conditioning],
    request: RenderRequest,
    runtime: Runtime,
    picture: NDArray[np.uint8] | None = None,
) -> Session:
    """A request on a loaded model, by the pipeline of its kind.

    texts: the conditions of the prompt and of the negative prompt, then of further texts. picture: (H, W, 3) of the canvas,
    that an edit or a ControlNet sees.
    """
    if family.spec.facts.image_channels:
        assert picture is not None, "an edit is of a picture"
        return CosXLEdit(family, texts, runtime, picture=picture)
    if family.spec.facts.network == "pixart":
        edges = picture if family.control else None
        return PixArtSigma(family, texts, runtime, position_mode=request.position_mode, picture=edges)
    return CosXL(family, texts, runtime)


def load_family(request: RenderRequest, spec: ModelSpec, runtime: Runtime) -> Family:
    """The networks of a request's model, on the device or, where weights are offloaded, in host memory; no small VAE."""
    home = runtime.device if runtime.offload == "none" else HOST
    homes = {
        component: Home(device=home, dtype=TORCH_DTYPE[dtype], storage=storage_of(runtime.weights, component))
        for component, dtype in (("network", runtime.dtype), ("vae", runtime.decode.rung.dtype))
    }
    network, control, vae = twice(lambda: _loaded(spec, homes, request.loras), "loading")
    family = Family.of(spec, network, vae, runtime)
    family.control = control
    return family


def can_remerge(family: Family) -> bool:
    """Whether a family's weights are where LoRAs can be merged into them: not in the hands of hooks that stream layers."""
    return family.weights.offload != "layers"


def remerge(family: Family, before: Sequence[LoraRef], loras: Sequence[LoraRef]) -> None:
    """Change the LoRAs of a family in memory: weights that either set touches are read and merged anew."""
    family.network = twice(lambda: remerge_network(family.network, family.spec, before, loras), "merging LoRAs")


def load_encoders(
    spec: ModelSpec, plan: MemoryPlan, device: torch.device, loras: Sequence[LoraRef], stay: bool = False
) -> TextEncoders:
    """The text encoders of a model, where and in which type the plan says; they are read when they first encode."""
    where = HOST if plan.text_on_host else device
    return TextEncoders(spec, TORCH_DTYPE[plan.text_dtype], where, loras, stay)


def encode(encoders: TextEncoders, prompts: Sequence[Wording]) -> list[Conditioning]:
    """The texts' conditions; on the CPU where the device runs out of memory for the towers."""
    texts, message = attempt(encoders.encode, prompts)
    if texts is not None:
        return texts
    encoders.move_to_host()
    free_memory()
    log.warning("out of memory with the text encoders on the device (%s); going on with them on the CPU", message)
    return twice(lambda: encoders.encode(prompts), "encoding the prompts")


def _loaded(
    spec: ModelSpec, homes: Mapping[str, Home], loras: Sequence[LoraRef]
) -> tuple[nn.Module, tuple[ControlBlock, ...], nn.Module]:
    """Network, ControlNet and VAE; homes: of 'network' and of 'vae'."""
    home, of_vae = homes["network"], homes["vae"]
    network = load_network(spec, home.dtype, home.device, loras, home.storage)
    shape = spec.network
    if isinstance(shape, PixArtShape) and not shape.kv_pooled and any(factor > 1 for factor in shape.kv_compression):
        add_compression(network, shape.kv_compression, read_kv_compression(spec))
    return network, load_control(spec, network, home), load_vae(spec, of_vae.dtype, of_vae.device, of_vae.storage)


def load_tiny(folder: str, spec: ModelSpec, dtype: str, device: torch.device) -> HaloVAE:
    """The small autoencoder in a folder. ModelError for another kind, or one of other latents."""
    try:
        module = load_autoencoder(Path(folder), TORCH_DTYPE[dtype], device)
    except ModelError as error:
        raise ModelError(f"tiny_vae {error}; give the folder of an AutoencoderTiny such as taesdxl") from None
    tiny = tiled_autoencoder(module)
    if not isinstance(tiny, HaloVAE):
        raise ModelError(f"tiny_vae {folder}: an {type(module).__name__}; give an AutoencoderTiny such as taesdxl")
    config: Any = module.config
    channels = int(config.latent_channels)
    if (channels, tiny.cell_px) != (spec.facts.latent_channels, spec.cell_px):
        raise ModelError(
            f"tiny_vae {folder}: of {channels} channels and {tiny.cell_px} px a cell; "
            f"{spec.name} has {spec.facts.latent_channels} and {spec.cell_px}: give the one made for it, or leave it out"
        )
    return tiny
