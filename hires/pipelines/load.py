"""Load what a request needs onto its device, by the pipeline of its family."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hires.checkpoints.families import PixArtShape
from hires.checkpoints.spec import ModelSpec
from hires.devices.probe import TORCH_DTYPE
from hires.errors import ModelError
from hires.models.attention_processors import add_compression
from hires.models.controlnet import load_control
from hires.models.loading import load_autoencoder, load_network, load_vae, read_kv_compression
from hires.models.offload import HOST
from hires.models.text_encoders import encode_prompts
from hires.options.lora import LoraRef
from hires.options.render import RenderRequest
from hires.pipelines.base import Family, LoadedParts, Runtime
from hires.pipelines.cosxl import CosXL
from hires.pipelines.cosxl_edit import CosXLEdit
from hires.pipelines.pixart_sigma import PixArtSigma
from hires.planning.plan import MemoryPlan
from hires.resume.journal import NO_JOURNAL, Journal
from hires.sampling.conditioning import Conditioning
from hires.tiling.halo import HaloVAE, tiled_autoencoder
from hires.tiling.retry import attempt, free_memory, twice

log = logging.getLogger(__name__)


def load_family(
    request: RenderRequest,
    plan: MemoryPlan,
    spec: ModelSpec,
    runtime: Runtime,
    picture: NDArray[np.uint8] | None = None,
    journal: Journal = NO_JOURNAL,
) -> Family:
    """The model of a request on its device, by the pipeline of its family.

    picture: (H, W, 3) of the canvas, that an edit or a ControlNet sees.
    """
    parts = load_parts(request, plan, spec, runtime, journal)
    if request.tiny_vae is not None:
        parts = replace(parts, tiny=load_tiny(request.tiny_vae, spec, runtime.decode.rung.dtype, runtime.device))
    if spec.facts.image_channels:
        assert picture is not None, "an edit is of a picture"
        return CosXLEdit(spec, parts, runtime, picture=picture)
    if spec.facts.network == "pixart":
        edges = picture if parts.control else None
        return PixArtSigma(spec, parts, runtime, position_mode=request.position_mode, picture=edges)
    return CosXL(spec, parts, runtime)


def load_parts(
    request: RenderRequest, plan: MemoryPlan, spec: ModelSpec, runtime: Runtime, journal: Journal = NO_JOURNAL
) -> LoadedParts:
    """Everything that a request needs, on the device or, where the plan offloads weights, in host memory.

    The text encoders come and go before the rest is loaded, where and in which type the plan says; they do not run at all where
    the journal has the conditions.
    """
    texts: Sequence[Conditioning] | None = journal.texts()
    if texts is None:
        where = HOST if plan.text_on_host else runtime.device
        texts = _encoded(spec, [request.prompt, request.negative], TORCH_DTYPE[plan.text_dtype], where, request.loras)
        journal.keep_texts(texts)
    free_memory()
    home = runtime.device if runtime.offload == "none" else HOST
    types = TORCH_DTYPE[runtime.dtype], TORCH_DTYPE[runtime.decode.rung.dtype]
    return twice(lambda: _loaded(spec, texts, home, types, request.loras), "loading")


def _encoded(
    spec: ModelSpec, prompts: list[str], dtype: torch.dtype, device: torch.device, loras: Sequence[LoraRef]
) -> Sequence[Conditioning]:
    """The prompts' conditions; on the CPU where the device runs out of memory for the towers."""
    texts, message = attempt(lambda where: encode_prompts(spec, prompts, dtype, where, loras), device)
    if texts is not None:
        return texts
    free_memory()
    log.warning("out of memory with the text encoders on %s (%s); going on with them on the CPU", device, message)
    return twice(lambda: encode_prompts(spec, prompts, dtype, HOST, loras), "encoding the prompts")


def _loaded(
    spec: ModelSpec,
    texts: Sequence[Conditioning],
    home: torch.device,
    types: tuple[torch.dtype, torch.dtype],
    loras: Sequence[LoraRef],
) -> LoadedParts:
    """Network, ControlNet and VAE on `home`; types: of the network and of the VAE."""
    dtype, vae_dtype = types
    network = load_network(spec, dtype, home, loras)
    shape = spec.network
    if isinstance(shape, PixArtShape) and not shape.kv_pooled and any(factor > 1 for factor in shape.kv_compression):
        add_compression(network, shape.kv_compression, read_kv_compression(spec))
    control = load_control(spec, network, dtype, home)
    return LoadedParts(texts=texts, network=network, control=control, vae=load_vae(spec, vae_dtype, home))


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
