"""diffusers' pipelines as they are, with what they offer against memory, and attached: the same weights, prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Way, version_of
from hires._imports import quiet_imports

PLAIN, SAVING, ATTACHED = "as it is", "enable_vae_tiling, enable_attention_slicing", "hires.attach"
WAYS = (PLAIN, SAVING, ATTACHED)
PANORAMA = ("StableDiffusionPanoramaPipeline", "StableDiffusionPipeline, hires.attach", "StableDiffusionPipeline")
NATIVE_CELLS = 64
STEPS = 4


def unet(xl: bool, quick: bool, full: bool = False) -> Any:
    """A UNet of SDXL's or SD1.5's plan, random weights: a quarter of the width, less where only the code is tried."""
    import json

    from hires.checkpoints.configs import shipped_config

    with quiet_imports():
        from diffusers import UNet2DConditionModel
    config = json.loads(shipped_config("sdxl" if xl else "sd15", "unet").read_text())
    if not full:
        widths = tuple(width // (10 if quick else 4) // 32 * 32 or 32 for width in config["block_out_channels"])
        config |= {"block_out_channels": widths, "attention_head_dim": tuple(width // 32 for width in widths)}
        config |= {"cross_attention_dim": 64, "transformer_layers_per_block": (1, 1, 2) if xl else 1}
        config |= {"sample_size": 8 if quick else NATIVE_CELLS}
        config |= {"projection_class_embeddings_input_dim": 6 * config["addition_time_embed_dim"] + 64} if xl else {}
    torch.manual_seed(2)
    return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def transformer(quick: bool, full: bool = False) -> Any:
    """A PixArt transformer, random weights: the full one, or a quarter as wide and deep."""
    with quiet_imports():
        from diffusers import PixArtTransformer2DModel
    torch.manual_seed(3)
    small = {"num_attention_heads": 2 if quick else 4, "num_layers": 2 if quick else 7, "caption_channels": 64}
    options = {"caption_channels": 4096} if full else small | {"cross_attention_dim": 72 * int(small["num_attention_heads"])}
    side = 128 if full else 8 if quick else NATIVE_CELLS
    return PixArtTransformer2DModel(sample_size=side, use_additional_conditions=False, **options).eval().requires_grad_(False)


def words(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def sdxl(quick: bool, full: bool = False) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the conditions to call it with."""
    from benchmarks.suites.scaling import narrow_vae

    with quiet_imports():
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    network = unet(True, quick, full)
    pipe = StableDiffusionXLPipeline(
        vae=narrow_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=network,
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
    width = network.config.cross_attention_dim
    return pipe, texts(width) | {"pooled_prompt_embeds": words(1, pooled), "negative_pooled_prompt_embeds": -words(1, pooled)}


def texts(width: int) -> dict[str, Any]:
    return {"prompt_embeds": words(1, 77, width), "negative_prompt_embeds": -words(1, 77, width)}


def pixart(quick: bool, full: bool = False) -> tuple[Any, dict[str, Any]]:
    from benchmarks.suites.scaling import narrow_vae

    with quiet_imports():
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
    network = transformer(quick, full)
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=narrow_vae(), transformer=network, scheduler=DPMSolverMultistepScheduler()
    )
    mask = torch.ones(1, 77, dtype=torch.long)
    said = {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return pipe, texts(network.config.caption_channels) | said | masks


def sd15(quick: bool, kind: str) -> tuple[Any, dict[str, Any]]:
    import diffusers

    from benchmarks.suites.scaling import narrow_vae

    with quiet_imports():
        made = getattr(diffusers, kind)
    network = unet(False, quick)
    pipe = made(
        vae=narrow_vae(), text_encoder=None, tokenizer=None, unet=network, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipe, texts(network.config.cross_attention_dim)


Makers = dict[str, Callable[[bool], tuple[Any, dict[str, Any]]]]
MAKERS: Makers = {
    "SDXL pipeline": sdxl,
    "PixArt-Sigma pipeline": pixart,
    "SDXL pipeline, full width": partial(sdxl, full=True),
    "PixArt-Sigma pipeline, full width": partial(pixart, full=True),
}


def pipeline(part: str, name: str, side: int, quick: bool) -> Way:
    """A pipeline's whole call, pixels included; of the full networks one step, to latents (their autoencoder is a part of its
    own)."""
    full = "full" in part
    pipe, said = MAKERS[part](quick)
    network = getattr(pipe, "unet", None) or pipe.transformer
    native = 8 * int(network.config.sample_size)
    facts = prepared(pipe, name)
    options = said | (
        {"num_inference_steps": 1, "output_type": "latent"} if full else {"num_inference_steps": STEPS, "output_type": "np"}
    )
    same = side <= native or name in (PLAIN, SAVING)
    lines = seam_lines(pipe, side) if name == ATTACHED and not full else ()
    return Way(
        run=partial(called, pipe, side, options), facts=facts, like=PLAIN if same else None, rows=lines, cols=lines,
        repeats=1 if full or side > 1024 else 3, warm_up=None if full else partial(called, pipe, native // 2, options),
    )  # fmt: skip


def prepared(pipe: Any, name: str) -> dict[str, Any]:
    """The pipeline put in order as the way says, and what is known of that."""
    pipe.set_progress_bar_config(disable=True)
    if name.endswith(ATTACHED):
        import hires

        made = hires.attach(pipe)
        return {"version": version_of("hires", "diffusers"), "note": f"tiles of {made.tile} cells above the trained size"}
    if name == SAVING:
        pipe.vae.enable_tiling()
        pipe.enable_attention_slicing()
    return {"version": version_of("diffusers")}


def seam_lines(pipe: Any, side: int) -> tuple[int, ...]:
    """Where the tiles of an attached pipeline meet, in pixels of a square picture."""
    from hires.metrics.seams import seam_lines as of_grid
    from hires.tiling.geometry import Size, make_grid

    made = pipe._hires_attached
    if side // 8 <= made.tile.width:
        return ()
    rows, _ = of_grid(make_grid(Size(side // 8, side // 8), made.tile, made.overlap), 8)
    return tuple(rows)


def called(pipe: Any, side: int, options: dict[str, Any]) -> Any:
    """(3, H, W) in [0, 1], or latents."""
    found = pipe(height=side, width=side, guidance_scale=5.0, generator=torch.Generator().manual_seed(5), **options).images[0]
    return np.moveaxis(found, -1, 0) if isinstance(found, np.ndarray) else found


def panorama(name: str, side: int, quick: bool) -> Way:
    """diffusers' MultiDiffusion at its defaults beside an attached pipeline of the same weights: windows of 64 cells each."""
    pipe, said = sd15(quick, name.split(",")[0])
    facts = prepared(pipe, name) | {"note": ""}
    cells, options = side // 8, said | {"num_inference_steps": STEPS, "output_type": "np"}
    lines: tuple[int, ...] = ()
    if name == PANORAMA[0]:
        views = pipe.get_views(side, side)
        facts["note"] = f"{len(views)} windows of 64 cells, 8 apart"
        ends = {8 * edge for view in views for edge in view[:2]}
        lines = tuple(sorted(ends - {0, side}))
    elif "attach" in name:
        made = pipe._hires_attached
        from hires.tiling.geometry import Size, make_grid

        facts["note"] = f"{make_grid(Size(cells, cells), made.tile, made.overlap).count} tiles of {made.tile} cells"
        lines = seam_lines(pipe, side)
    return Way(run=partial(called, pipe, side, options), facts=facts, rows=lines, cols=lines, repeats=1)
