"""The one road from a request to a file: plan, load, run, decode, write. What the command line and Python call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hires.devices.describe import budget_of, describe_device
from hires.engine.job import Images, RenderJob
from hires.engine.output import delivery
from hires.engine.requests import edges_of, editing, picture_of, size_of, spec_for, text_to_image, with_captions
from hires.engine.results import RenderResult
from hires.errors import RequestError
from hires.events import OnEvent
from hires.options.lora import Loras, loras_of
from hires.options.render import JournalOptions, RenderRequest
from hires.options.sizes import SizeLike
from hires.options.stage_text import StageLike, relay_of, stages_of
from hires.planning import planner
from hires.planning.plan import MemoryPlan

if TYPE_CHECKING:
    from hires.engine.requests import PictureLike


STRENGTH = 0.5  # of a picture to start from, where none is given


def render(
    prompt: str,
    *,
    size: SizeLike | None = None,
    init: PictureLike | None = None,
    strength: float | None = None,
    mask: PictureLike | None = None,
    control: PictureLike | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    model: str = "demo",
    negative: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strategy: str = "auto",
    tile_px: int | None = None,
    overlap_px: int | None = None,
    sigma_max: float | str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    vram: str | int | None = None,
    ram: str | int | None = None,
    family: str | None = None,
    parts: str | Path | None = None,
    loras: Loras = (),
    position_mode: str = "global",
    kv_compression: str = "checkpoint",
    tiny_vae: str | Path | None = None,
    attention: str | None = None,
    attention_policy: str | None = None,
    preset: str = "balanced",
    relay: StageLike | None = None,
    stages: Sequence[StageLike] = (),
    colour_fix: str | None = None,
    allow_approximate: bool = False,
    clean_caption: bool = False,
    journal: JournalOptions | None = JournalOptions(),
    bits: int | None = None,
    on_event: OnEvent | None = None,
) -> RenderResult:
    """Render a prompt at exactly `size` and return the result; with `output` write a file that holds prompt and plan.

    Args:
        prompt: what to draw.
        size: "4096x4096" (WIDTHxHEIGHT), a (width, height) pair, or a Size(height, width), in pixels; None takes `init`'s.
        init: a picture to start from instead of noise: a path, a PIL image or (height, width, 3) uint8. It fills the size,
            cut evenly where its shape is another.
        strength: how much of it is drawn anew, above 0 up to 1; default 0.5. The run takes the last `strength` of its steps.
        mask: of `init`: white where it is drawn anew, black where its pixels stay as they are, blended between.
        control: white edges on black (HED) that a PixArt ControlNet checkpoint follows; it fills the size as `init` does.
        output: a path in .png, .tif (BigTIFF, tiled, with a pyramid), .jpg or .webp, written while the picture is decoded; it
            appears whole or not at all. None keeps the picture in memory.
        overwrite: replace a file that exists.
        model: "demo", a checkpoint file, a diffusers folder, or "org/name" on the Hugging Face hub.
        negative: what to keep out of the picture.
        seed: same seed, same picture.
        steps, guidance: of the base picture; None takes the model's own.
        sampler, schedule: names of ours, A1111's or ComfyUI's, such as "dpmpp_2m", "DPM++ 2M Karras"; None: the model's own.
        strategy: "auto", "direct", "tiled" or "progressive".
        tile_px, overlap_px: tile side and overlap in pixels; None takes the model's training size and a quarter.
        sigma_max: the noise level that an EDM model such as CosXL starts from, or "auto" for one that goes with the size;
            None takes the model's own. Refused for variance-preserving models.
        dtype: "auto", "fp32", "bf16" or "fp16".
        device: "auto", "cpu" or "cuda:0".
        vram: memory budget such as "12GiB" (2^30) or "24GB" (10^9), or bytes; default: what is free.
        ram: what the whole process may hold in host memory, in the same units; default: nothing is said.
        family: what the model is, for files whose keys are those of several families, such as "sdxl-turbo".
        parts: a diffusers folder in which parts that the model lacks are looked for (tokenizers, text encoders, VAE).
        loras: LoRA files to merge: "style.safetensors", "style.safetensors:0.8" or LoraRef(path, scale) each.
        position_mode: where a PixArt tile is told that it lies: "global" (on the canvas), "local" (a whole picture), "blend".
        kv_compression: of PixArt: "checkpoint", or "average", an experiment that thins keys and values.
        tiny_vae: the folder of a small autoencoder (TAESD, TAESDXL): every step's event carries a preview, and it decodes,
            as a named approximation, where every exact way ran out of memory.
        attention: run the network's attention on this backend (`hires info` lists them) or fail with its reason.
        attention_policy: beyond the trained size: "npa", "npa:1024" (a window in px), "npa+shift", "windows", "kvpool:2" or
            "proportional": self-attention over the whole canvas, a named approximation; "global": tiles. None: the preset's.
        preset: "fast", "balanced" or "best": how many stages and steps, and what guides them.
        relay: what every stage after the first takes instead, as `StageSpec` or text such as "sigma=1,steps=8,guide=none".
        stages: all of them, the base picture first, each with its size: "1024x1024,steps=30", "4096x4096,steps=8,sigma=1".
        colour_fix: "wavelet" or "adain": the colours of `init`, or of the base picture, for the finished picture.
        journal: how a render with an output is kept track of, so that the same call goes on after anything that stopped it;
            JournalOptions(resume=True) demands that there is something to go on from. None: not at all.
        allow_approximate: where nothing exact has room, draw another picture with smaller windows, and say so.
        clean_caption: clean prompts as PixArt's training captions were; refused where it would lose most of one.
        bits: 8, the default, or 16 of each value, which PNG and TIFF hold.
        on_event: called with an Event after every tile batch; raising hires.errors.Cancelled in it stops the render.

    Returns:
        A RenderResult; its `pixels` are (height, width, 3) uint8 or uint16, read from the file where there is one.

    Raises:
        RequestError: a value that cannot be carried out; nothing was rendered.
        RunError: memory or disk ran out on the way; no file was written.
        Cancelled: raised by `on_event`.
    """
    picture = None if init is None else picture_of(init)
    if init is None and mask is not None:
        raise RequestError("--mask: says where a picture is drawn anew; give the picture with --init")
    if init is None and strength is not None:
        raise RequestError(f"--strength {strength}: how much of a picture to draw anew; give the picture with --init")
    request = RenderRequest(
        prompt=prompt,
        size=size_of(size, picture),
        strength=strength if strength is not None or init is None else STRENGTH,
        negative=negative,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        schedule=schedule,
        strategy=strategy,
        dtype=dtype,
        tile_px=tile_px,
        overlap_px=overlap_px,
        sigma_max=sigma_max,
        family=family,
        parts=None if parts is None else str(parts),
        loras=loras_of(loras),
        position_mode=position_mode,
        kv_compression=kv_compression,
        tiny_vae=None if tiny_vae is None else str(tiny_vae),
        attention=attention,
        attention_policy=attention_policy,
        preset=preset,
        relay=relay_of(relay),
        stages=stages_of(stages),
        colour_fix=colour_fix,
        allow_approximate=allow_approximate,
        clean_caption=clean_caption,
    )
    spec = text_to_image(spec_for(request), prompt)
    edges = edges_of(control, spec)
    file = delivery(output, overwrite, request.size, bits)
    redrawn = None if mask is None else picture_of(mask)
    images = Images(init=picture, edges=edges, mask=redrawn)
    from hires.engine.run import run

    return run(
        RenderJob(
            request=request, spec=spec, output=file, images=images, device=device, vram=vram, ram=ram, journal=journal,
            on_event=on_event,
        )
    )  # fmt: skip


def edit(
    picture: PictureLike,
    instruction: str,
    *,
    model: str,
    size: SizeLike | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    negative: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    image_guidance: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strategy: str = "auto",
    tile_px: int | None = None,
    overlap_px: int | None = None,
    sigma_max: float | str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    vram: str | int | None = None,
    ram: str | int | None = None,
    family: str | None = None,
    parts: str | Path | None = None,
    loras: Loras = (),
    tiny_vae: str | Path | None = None,
    attention: str | None = None,
    attention_policy: str | None = None,
    preset: str = "balanced",
    relay: StageLike | None = None,
    stages: Sequence[StageLike] = (),
    allow_approximate: bool = False,
    journal: JournalOptions | None = JournalOptions(),
    bits: int | None = None,
    on_event: OnEvent | None = None,
) -> RenderResult:
    """Change a picture as an instruction says, at the picture's own size or `size`, with a model that edits (CosXL-Edit).

    Args:
        picture: a path, a PIL image or (height, width, 3) uint8; it fills `size`, cut evenly where its shape is another.
        instruction: what to change, such as "make it winter".
        guidance: how strictly to follow the instruction; image_guidance: how closely to keep to the picture.
        model and all others: as for `render`.

    Raises:
        RequestError, RunError, Cancelled: as `render` does; RequestError also for a model that only draws from text.
    """
    pixels = picture_of(picture)
    request = RenderRequest(
        prompt=instruction,
        size=size_of(size, pixels),
        negative=negative,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        image_guidance=image_guidance,
        sampler=sampler,
        schedule=schedule,
        strategy=strategy,
        dtype=dtype,
        tile_px=tile_px,
        overlap_px=overlap_px,
        sigma_max=sigma_max,
        family=family,
        parts=None if parts is None else str(parts),
        loras=loras_of(loras),
        tiny_vae=None if tiny_vae is None else str(tiny_vae),
        attention=attention,
        attention_policy=attention_policy,
        preset=preset,
        relay=relay_of(relay),
        stages=stages_of(stages),
        allow_approximate=allow_approximate,
    )
    spec, file = editing(spec_for(request)), delivery(output, overwrite, request.size, bits)
    images = Images(init=pixels)
    from hires.engine.run import run

    return run(
        RenderJob(
            request=request, spec=spec, output=file, images=images, device=device, vram=vram, ram=ram, journal=journal,
            on_event=on_event,
        )
    )  # fmt: skip


def plan(
    prompt: str = "",
    *,
    size: SizeLike,
    model: str = "demo",
    negative: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strategy: str = "auto",
    tile_px: int | None = None,
    overlap_px: int | None = None,
    sigma_max: float | str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    vram: str | int | None = None,
    ram: str | int | None = None,
    family: str | None = None,
    parts: str | Path | None = None,
    loras: Loras = (),
    position_mode: str = "global",
    kv_compression: str = "checkpoint",
    tiny_vae: str | Path | None = None,
    attention: str | None = None,
    attention_policy: str | None = None,
    preset: str = "balanced",
    relay: StageLike | None = None,
    stages: Sequence[StageLike] = (),
    colour_fix: str | None = None,
    allow_approximate: bool = False,
    clean_caption: bool = False,
) -> MemoryPlan:
    """What `render` would do with the same arguments, without loading weights.

    With a `vram` and device "auto" the plan is for a card of that size, here or elsewhere, and torch is not imported;
    name the device to plan for this machine with that budget. RequestError as for `render`.
    """
    request = RenderRequest(
        prompt=prompt,
        size=size_of(size),
        negative=negative,
        model=model,
        seed=seed,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        schedule=schedule,
        strategy=strategy,
        dtype=dtype,
        tile_px=tile_px,
        overlap_px=overlap_px,
        sigma_max=sigma_max,
        family=family,
        parts=None if parts is None else str(parts),
        loras=loras_of(loras),
        position_mode=position_mode,
        kv_compression=kv_compression,
        tiny_vae=None if tiny_vae is None else str(tiny_vae),
        attention=attention,
        attention_policy=attention_policy,
        preset=preset,
        relay=relay_of(relay),
        stages=stages_of(stages),
        colour_fix=colour_fix,
        allow_approximate=allow_approximate,
        clean_caption=clean_caption,
    )
    return planner.plan(with_captions(request), spec_for(request), describe_device(device, budget_of(vram), budget_of(ram)))
