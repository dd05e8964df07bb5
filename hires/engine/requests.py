"""What a caller says, as the parts of a request: sizes, pictures, stages, LoRAs; the model, the device and the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hires.checkpoints.families import PixArtShape, second_half_factors
from hires.checkpoints.loras import with_loras
from hires.checkpoints.spec import ModelSpec, load_spec
from hires.errors import RequestError, SizeError
from hires.options import captions
from hires.options.render import RenderRequest
from hires.options.sizes import SizeLike, as_size, check_size
from hires.tiling.geometry import Size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image


if TYPE_CHECKING:
    PictureLike = str | Path | Image.Image | NDArray[np.uint8]


def edges_of(control: PictureLike | None, spec: ModelSpec) -> NDArray[np.uint8] | None:
    """The picture that a ControlNet follows. RequestError where one of the two is missing."""
    follows = isinstance(spec.network, PixArtShape) and spec.network.control_blocks > 0
    if control is None:
        if follows:
            raise RequestError(f"--model {spec.name}: a ControlNet; give the edges that it follows with --control EDGES.png")
        return None
    if not follows:
        raise RequestError(
            f"--control: {spec.name} has no ControlNet; give one with --model, such as PixArt-XL-2-1024-ControlNet.pth"
        )
    return picture_of(control)


def picture_of(source: PictureLike) -> NDArray[np.uint8]:
    """Its pixels, (H, W, 3) uint8. RequestError where it cannot be read."""
    from hires.images.whole import read_picture

    return read_picture(source)


def spec_for(request: RenderRequest) -> ModelSpec:
    """The model of a request with what its LoRAs and its options make of it."""
    spec = with_loras(load_spec(request.model, family=request.family, parts=request.parts), request.loras)
    for option, value, default in (
        ("--positions", request.position_mode, "global"),
        ("--kv-compression", request.kv_compression, "checkpoint"),
    ):
        if value != default and not isinstance(spec.network, PixArtShape):
            raise RequestError(f"{option} {value}: is of PixArt models, {spec.name} is {spec.facts.title}; leave it out")
    return pooled_keys(spec) if request.kv_compression == "average" else spec


def pooled_keys(spec: ModelSpec) -> ModelSpec:
    """The same model with 2 x 2 keys and values averaged in the second half of its blocks: an experiment.

    Two thirds of the FLOPs at 4K, and another picture than these weights were trained for. RequestError where they were
    trained with compression of their own.
    """
    shape = spec.network
    assert isinstance(shape, PixArtShape), "checked before"
    if any(factor > 1 for factor in shape.kv_compression):
        raise RequestError(f"--kv-compression average: {spec.name} has compression of its own; leave the option out")
    note = "approximation: keys and values averaged 2 x 2 in the second half of the blocks, as asked for"
    thinned = replace(shape, kv_compression=second_half_factors(shape.layers), kv_pooled=True)
    return replace(spec, network=thinned, notes=(*spec.notes, note))


def text_to_image(spec: ModelSpec, prompt: str) -> ModelSpec:
    """The same model. RequestError for one that a prompt alone cannot run."""
    if spec.facts.image_channels:
        channels = spec.facts.latent_channels + spec.facts.image_channels
        raise RequestError(
            f"--model {spec.name}: {spec.facts.title} has {channels} input channels "
            f'and edits a picture: `hires edit IN.png "{prompt or "make it winter"}"`, or give a text-to-image model'
        )
    return spec


def editing(spec: ModelSpec) -> ModelSpec:
    """The same model. RequestError for one that does not see the picture."""
    if not spec.facts.image_channels:
        raise RequestError(
            f"--model {spec.name}: {spec.facts.title} draws from text and does not see the picture; give a model that edits, "
            "such as cosxl_edit.safetensors, or start from the picture: hires render PROMPT --init IN.png --strength 0.5"
        )
    return spec


def with_captions(request: RenderRequest) -> RenderRequest:
    """The request with its prompts cleaned, where that was asked for."""
    if not request.clean_caption:
        return request
    return replace(request, prompt=captions.clean(request.prompt), negative=captions.clean(request.negative))


def size_of(size: SizeLike | None, picture: NDArray[np.uint8] | None = None) -> Size:
    """The size asked for, else the picture's. SizeError where there is neither."""
    if size is None:
        if picture is None:
            raise SizeError("no size: give --size WIDTHxHEIGHT, such as 4096x4096")
        return check_size(Size(*picture.shape[:2]))
    return as_size(size)
