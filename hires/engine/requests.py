"""Turns what a caller gives into a request, a model and pictures.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hires.checkpoints.adapters.embeddings import chunks_of, clip_vocabulary, count_tokens, prompts_of
from hires.checkpoints.adapters.loras import with_loras
from hires.checkpoints.families import PixArtShape, second_half_factors
from hires.checkpoints.model import ModelSpec
from hires.checkpoints.spec import load_spec
from hires.errors import RequestError, SizeError
from hires.options import captions
from hires.options.fields import PictureLike, declared
from hires.options.lora import LoraRef, loras_of, parse_lora_tag
from hires.options.plan import PlanOptions
from hires.options.render import EditOptions, RenderOptions, RenderRequest
from hires.options.sizes import SizeLike, as_crop, as_size, check_size
from hires.options.stage_text import relay_of, stages_of
from hires.options.upscale import REFINE_STRENGTH
from hires.prompts.request import longest_text, prompt_notes
from hires.prompts.script import Prompts, Wording, positive_parts
from hires.prompts.tags import check_lengths, cut_tags, find_lora
from hires.tiling.geometry import Size
from hires.units import parse_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

PATHS = ("parts", "vae", "tiny_vae", "lora_dir", "embeddings")
SHORT_BYTES = 70
"""A text of no more bytes takes one chunk, whatever the vocabulary."""
STRENGTH = 0.5  # of a picture to start from, where none is given
DEFAULT_SCALE = 4  # of an enlargement by Lanczos
ORIENTATION = 0x0112  # EXIF


def request_from(prompt: str, options: RenderOptions | EditOptions, size: Size, **changes: object) -> RenderRequest:
    """The request of a call: options as values, its size in pixels. RequestError for invalid values."""
    fields: dict[str, Any] = {
        name: getattr(options, name) for name in declared(RenderRequest) if name in declared(type(options))
    }
    paths = {name: None if (path := getattr(options, name, None)) is None else str(path) for name in PATHS}
    check_lengths((prompt, options.negative, options.prompt_l, options.negative_l))
    lora_of, commented = partial(tag_lora, folder=paths["lora_dir"]), options.prompt_syntax in (None, "a1111")
    prompt, loras = cut_tags(prompt, lora_of, commented)
    negative, unwanted = cut_tags(options.negative, lora_of, commented)
    fields |= paths | {
        "negative": negative,
        "loras": (*loras_of(options.loras), *loras, *unwanted),
        "original_size": None if options.original_size is None else as_size(options.original_size),
        "target_size": None if options.target_size is None else as_size(options.target_size),
        "crop": None if options.crop is None else as_crop(options.crop),
        "relay": relay_of(options.relay),
        "stages": stages_of(options.stages),
    }
    return RenderRequest(prompt=prompt, size=size, **fields | changes)


def tag_lora(inside: str, folder: str | None) -> LoraRef:
    """The LoRA of a tag `<lora:name:0.8>` in a prompt, from a folder. RequestError where there is none."""
    ref, left = parse_lora_tag(inside)
    if left:
        raise RequestError(f"prompt tag <lora:{inside[:80]}>: {left[0]} is not supported; leave it out")
    return replace(ref, path=str(find_lora(ref.path, folder)))


def start_strength(options: RenderOptions) -> float | None:
    """How much of `init` is drawn anew. RequestError where a mask or a strength has no picture to apply to."""
    if options.init is not None:
        return STRENGTH if options.strength is None else options.strength
    if options.mask is not None:
        raise RequestError("mask: says where a picture is drawn anew; give the picture with `init`")
    if options.strength is not None:
        raise RequestError(f"strength {options.strength}: how much of a picture to draw anew; give the picture with `init`")
    return None


def planned(prompt: str, options: PlanOptions) -> tuple[RenderRequest, ModelSpec]:
    """What `render`, `edit` or `upscale` would plan with these options. RequestError where they would refuse them."""
    if options.enlarges:
        request = _refinement(prompt, options)
        return request, text_to_image(spec_for(request), prompt)
    start = options.init if options.init is not None else options.picture
    strength = start_strength(options)
    size = size_of(options.size, None if start is None else picture_size(start))
    request = request_from(prompt, options, size, strength=strength)
    spec = spec_for(request)
    if options.init is not None:
        text_to_image(spec, prompt)
    if options.picture is not None or options.image_guidance is not None:
        editing(spec)
    if options.control is not None:
        check_control(spec)
        picture_size(options.control)
    if options.mask is not None:
        picture_size(options.mask)
    return request, spec


def _refinement(prompt: str, options: PlanOptions) -> RenderRequest:
    """The render that draws over an enlarged picture."""
    source = options.picture if options.picture is not None else options.init
    if source is None:
        raise RequestError("picture: give the picture to enlarge, whose size the plan depends on")
    if not options.refine and options.upscaler != "demo":
        raise RequestError(
            f"upscaler {options.upscaler}: enlarges by rows without a diffusion model; nothing to plan without `refine`"
        )
    given = picture_size(source)
    if options.size is None and options.scale is None and options.upscaler not in ("lanczos", "demo", None):
        raise RequestError(f"upscaler {options.upscaler}: give `scale` or `size`; a plan does not load the network")
    size = as_size(options.size) if options.size is not None else scaled(given, options.scale or DEFAULT_SCALE)
    return request_from(
        prompt,
        options,
        size,
        strength=REFINE_STRENGTH if options.strength is None else options.strength,
        tile_px=None,  # those of the network that enlarges
        colour_fix={None: "wavelet", "none": None}.get(options.colour_fix, options.colour_fix),
        relay=relay_of(structure_relay(given, size)),
    )


def scaled(size: Size, scale: float) -> Size:
    """A size enlarged by a factor. SizeError where it is too small or too large."""
    return check_size(Size(max(1, round(size.height * scale)), max(1, round(size.width * scale))))


def structure_cutoff(source: Size, size: Size) -> float:
    """The Nyquist frequency of the given picture on the canvas, cycles per cell: below it the picture is kept."""
    return min(0.5, 0.5 * max(source.height / size.height, source.width / size.width))


def structure_relay(source: Size, size: Size) -> str:
    """The guide that holds a refinement to all that the given picture can show."""
    return f"guide=structure:{structure_cutoff(source, size):.6g}"


def picture_size(source: PictureLike) -> Size:
    """The size of a picture as it is shown, from its header alone. RequestError where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    from hires.images.decoders import PILLOW_FORMATS

    if not isinstance(source, str | Path | Image.Image):
        if len(source.shape) != 3:
            raise RequestError(f"picture of shape {source.shape}: give (height, width, 3) uint8")
        return Size(*source.shape[:2])
    if isinstance(source, Image.Image):
        return _shown_size(source)
    try:
        with Image.open(Path(source).expanduser(), formats=PILLOW_FORMATS) as opened:
            return _shown_size(opened)
    except UnidentifiedImageError:  # 16 bits of colour in a TIFF, HEIC, AVIF
        from hires.images.sources import ImageSource

        with ImageSource.open(source) as read:
            return read.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"picture {str(source)[:200]}: {error}; give a picture file such as a PNG or JPEG") from None


def _shown_size(picture: Image.Image) -> Size:
    """Its size after the turn that its EXIF orientation tells."""
    width, height = picture.size
    if picture.format == "PNG" and "exif" not in picture.info:  # Pillow would decode the pixels to look behind them
        return Size(height, width)
    return Size(width, height) if picture.getexif().get(ORIENTATION, 1) >= 5 else Size(height, width)


def check_control(spec: ModelSpec) -> None:
    """RequestError for a model without a ControlNet."""
    if not (isinstance(spec.network, PixArtShape) and spec.network.control_blocks > 0):
        raise RequestError(
            f"control: {spec.name} has no ControlNet; give one with `model`, such as PixArt-XL-2-1024-ControlNet.pth"
        )


def edges_of(control: PictureLike | None, spec: ModelSpec) -> NDArray[np.uint8] | None:
    """The picture that a ControlNet follows. RequestError where one of the two is missing."""
    if control is not None:
        check_control(spec)
        return picture_of(control)
    if isinstance(spec.network, PixArtShape) and spec.network.control_blocks > 0:
        raise RequestError(f"model {spec.name}: a ControlNet; give the edges that it follows with `control`")
    return None


def picture_of(source: PictureLike) -> NDArray[np.uint8]:
    """Its pixels, (H, W, 3) uint8. RequestError where it cannot be read."""
    from hires.images.whole import read_picture

    return read_picture(source)


def spec_for(request: RenderRequest) -> ModelSpec:
    """The model of a request with what its LoRAs and its options make of it."""
    plain = load_spec(
        request.model,
        family=request.family,
        parts=request.parts,
        profile=request.few_step,
        vae=request.vae,
        prediction=request.prediction,
        zero_terminal_snr=request.zero_terminal_snr,
    )
    spec = with_loras(plain, request.loras, request.few_step)
    for option, value, default in (
        ("position_mode", request.position_mode, "global"),
        ("kv_compression", request.kv_compression, "checkpoint"),
    ):
        if value != default and not isinstance(spec.network, PixArtShape):
            raise RequestError(f"{option} {value}: is of PixArt models, {spec.name} is {spec.facts.title}; leave it out")
    spec = pooled_keys(spec) if request.kv_compression == "average" else spec
    return with_prompts(spec, request)


def with_prompts(spec: ModelSpec, request: RenderRequest) -> ModelSpec:
    """The model with what its prompts make of it: notes, and how many tokens and estimates they take.

    RequestError for a prompt that it cannot read.
    """
    model = spec.text_model
    prompts = prompts_of(request, spec)
    notes = [*prompt_notes(request, prompts, model)]
    if model.words_only or spec.missing:
        return replace(spec, notes=(*spec.notes, *notes, *cut_notes(spec, prompts)))
    chunks = longest_text(prompts, partial(chunk_count, spec))
    if chunks > 1:
        notes.append(f"the longest text takes {chunks} chunks of {spec.facts.tokens - 2} tokens, joined")
    return replace(
        spec,
        notes=(*spec.notes, *notes),
        prompt_chunks=chunks,
        prompt_parts=len(positive_parts(prompts)),
    )


def cut_notes(spec: ModelSpec, prompts: Prompts) -> Iterator[str]:
    """Notes on texts of which a model that reads one chunk reads the beginning alone."""
    if spec.missing:
        return
    limit = spec.facts.tokens - 1
    if spec.text_model.towers:
        limit = clip_vocabulary(spec, "tokenizer").length - 2
    for which, text in (("prompt", prompts.positive), ("negative prompt", prompts.negative)):
        if len(text.encode()) > limit and (count := count_tokens(spec, text)) > limit:
            yield f"the {which} has {count} tokens, {spec.text_model.name} reads the first {limit}"


def chunk_count(spec: ModelSpec, text: Wording) -> int:
    """How many chunks a text takes; one where it is too short for more."""
    if not text.embeddings and len((text.text + (text.text_l or "")).encode()) <= SHORT_BYTES and "BREAK" not in text.text:
        return 1
    return len(chunks_of(spec, text)[0])


def pooled_keys(spec: ModelSpec) -> ModelSpec:
    """The same model with 2 x 2 keys and values averaged in the second half of its blocks: an experiment.

    Two thirds of the FLOPs at 4K, and another picture than these weights were trained for. RequestError where they were
    trained with compression of their own.
    """
    shape = spec.network
    assert isinstance(shape, PixArtShape), "checked before"
    if any(factor > 1 for factor in shape.kv_compression):
        raise RequestError(f"kv_compression average: {spec.name} has compression of its own; leave the option out")
    note = "approximation: keys and values averaged 2 x 2 in the second half of the blocks, as asked for"
    thinned = replace(shape, kv_compression=second_half_factors(shape.layers), kv_pooled=True)
    return replace(spec, network=thinned, notes=(*spec.notes, note))


def text_to_image(spec: ModelSpec, prompt: str) -> ModelSpec:
    """The same model. RequestError for one that a prompt alone cannot run."""
    if spec.facts.image_channels:
        channels = spec.facts.latent_channels + spec.facts.image_channels
        raise RequestError(
            f"model {spec.name}: {spec.facts.title} has {channels} input channels "
            f'and edits a picture: `hires edit IN.png "{prompt or "make it winter"}"`, or give a text-to-image model'
        )
    return spec


def editing(spec: ModelSpec) -> ModelSpec:
    """The same model. RequestError for one that does not see the picture."""
    if not spec.facts.image_channels:
        raise RequestError(
            f"model {spec.name}: {spec.facts.title} draws from text and does not see the picture; give a model that edits, "
            "such as cosxl_edit.safetensors, or start from the picture: render with `init` IN.png and `strength` 0.5"
        )
    return spec


def with_captions(request: RenderRequest) -> RenderRequest:
    """The request with its prompts cleaned, where that was asked for."""
    if not request.clean_caption:
        return request
    return replace(request, prompt=captions.clean(request.prompt), negative=captions.clean(request.negative))


def check_amount(option: str, amount: str | int | None) -> None:
    """RequestError that names the option where its value is no amount of memory."""
    if amount is not None:
        try:
            parse_bytes(str(amount))
        except RequestError as error:
            raise RequestError(f"{option} {error}") from None


def later_requests(
    request: RenderRequest, options: RenderOptions | EditOptions, prompts: Iterable[str]
) -> Iterator[RenderRequest]:
    """The requests of further prompts with the same options; one whose prompt cannot be read fails in its own turn."""
    for prompt in prompts:
        try:
            yield request_from(prompt, options, request.size)
        except RequestError:
            continue


def encoded_ahead(request: RenderRequest, later: Iterable[RenderRequest]) -> tuple[RenderRequest, ...]:
    """The later requests whose prompts can be encoded along with this one's: those with the same LoRAs."""
    return tuple(with_captions(each) for each in later if each.loras == request.loras)


def size_of(size: SizeLike | None, picture: Size | None = None) -> Size:
    """The size asked for, else the picture's. SizeError where there is neither."""
    if size is not None:
        return as_size(size)
    if picture is None:
        raise SizeError("no size: give `size` as WIDTHxHEIGHT, such as 4096x4096")
    return check_size(picture)
