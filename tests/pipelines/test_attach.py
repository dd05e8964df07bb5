"""`hires.attach` in tiny diffusers pipelines: the same pictures, less memory, and nothing left after `detach`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

import hires
from hires.errors import BudgetError, RequestError
from hires.kernels.dispatch import attention

CELLS, CELL_PX = 16, 4
NATIVE = CELLS * CELL_PX


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=NATIVE,
    ).eval()  # fmt: skip


def unet(xl: bool, channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(2)
    more: dict[str, Any] = {}
    if xl:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=CELLS, in_channels=channels, out_channels=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=32, transformer_layers_per_block=1, **more,
    ).eval()  # fmt: skip


def transformer() -> PixArtTransformer2DModel:
    torch.manual_seed(3)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=2, caption_channels=32, patch_size=2,
        sample_size=CELLS, in_channels=4, out_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def sdxl(kind: type = StableDiffusionXLPipeline) -> Any:
    pipe = kind(
        vae=autoencoder(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet(xl=True),
        scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip
    pipe.text_encoder_2 = None
    return pipe


def sd15(kind: type = StableDiffusionPipeline, channels: int = 4) -> Any:
    return kind(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet(xl=False, channels=channels), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pixart(kind: type = PixArtSigmaPipeline) -> Any:
    return kind(
        tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=transformer(), scheduler=DPMSolverMultistepScheduler()
    )


def texts(pipe: Any) -> dict[str, Any]:
    name = type(pipe).__name__
    plain: dict[str, Any] = {"prompt_embeds": tokens(1, 7, 32), "negative_prompt_embeds": -tokens(1, 7, 32)}
    if "XL" in name:
        plain |= {"pooled_prompt_embeds": tokens(1, 32), "negative_pooled_prompt_embeds": -tokens(1, 32)}
    if "PixArt" in name:
        mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
        plain |= {"prompt": None, "negative_prompt": None, "use_resolution_binning": False}
        plain |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return plain


def drawn(pipe: Any, height: int = NATIVE, width: int = NATIVE, **more: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        height=height, width=width, num_inference_steps=3, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(5), **texts(pipe), **more,
    )  # fmt: skip
    result: np.ndarray = found.images[0]
    return result


MAKERS: list[Callable[[], Any]] = [sdxl, sd15, pixart, lambda: pixart(PixArtAlphaPipeline)]
NAMES = ["sdxl", "sd15", "pixart-sigma", "pixart-alpha"]


def state(pipe: Any) -> list[Any]:
    """What makes the modules what they are: their own attributes, and the identity of everything in them."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    found: list[Any] = [sorted(pipe.__dict__)]
    for module in (pipe.vae, network):
        found.append(
            {name: id(value) for name, value in module.__dict__.items() if not name.startswith("_") or name == "_modules"}
        )
    found.append({name: id(processor) for name, processor in network.attn_processors.items()})
    found.append([name for name, module in network.named_modules() for key in module.__dict__ if key == "forward"])
    return found


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
@pytest.mark.parametrize("size", [(NATIVE, NATIVE), (56, 72)])
def test_the_same_picture_at_the_trained_size_and_nothing_left(make: Callable[[], Any], size: tuple[int, int]) -> None:
    pipe = make()
    plain = drawn(pipe, *size)
    before = state(pipe)
    hires.attach(pipe, vram="2GB")
    assert np.abs(drawn(pipe, *size) - plain).max() <= 1e-4
    hires.detach(pipe)
    assert state(pipe) == before
    assert np.array_equal(drawn(pipe, *size), plain)


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_larger_canvases_in_tiles_equal_a_plain_loop(make: Callable[[], Any]) -> None:
    """The network's output over the canvas: tiles one at a time, hann weights normalised per axis, crop offsets told."""
    pipe = make()
    network = getattr(pipe, "unet", None) or pipe.transformer
    canvas = tokens(2, 4, 40, 28)
    given: dict[str, Any] = {"timestep": torch.tensor(400), "encoder_hidden_states": tokens(2, 7, 32)}
    if "XL" in type(pipe).__name__:
        ids = torch.tensor([[160.0, 112, 0, 0, 160, 112]] * 2)
        given["added_cond_kwargs"] = {"text_embeds": tokens(2, 32), "time_ids": ids}
    if hasattr(pipe, "transformer"):
        given |= {
            "timestep": torch.tensor([400, 400]),
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1] * 7]),
        }
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    tops, lefts = [0, 12, 24], [0, 12]
    ramp = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2 + 1e-3
    total = weight = 0
    for top in tops:
        for left in lefts:
            told = dict(given)
            if "XL" in type(pipe).__name__:
                moved = ids + torch.tensor([0.0, 0, top * CELL_PX, left * CELL_PX, 0, 0])
                told["added_cond_kwargs"] = {"text_embeds": tokens(2, 32), "time_ids": moved}
            with torch.no_grad():
                out = network(canvas[:, :, top : top + 16, left : left + 16], **told, return_dict=False)[0].numpy()
            part, share = np.zeros((2, out.shape[1], 40, 28)), np.zeros((40, 28))
            part[:, :, top : top + 16, left : left + 16] = out * np.outer(ramp, ramp)
            share[top : top + 16, left : left + 16] = np.outer(ramp, ramp)
            total, weight = total + part, weight + share
    made = hires.attach(pipe, vram="2GB")
    with torch.no_grad():
        found = network(canvas, **given, return_dict=False)[0]
        named = network(canvas, **given).sample
    assert np.abs(found.numpy() - total / weight).max() <= 1e-5 * np.abs(total / weight).max()
    assert torch.equal(found, named) and made.retries == 0


@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_out_of_memory_anywhere_gives_the_same_picture(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make()
    made = hires.attach(pipe, vram="2GB")
    plain = drawn(pipe, 112, 160)
    fallen = []
    for module, limit in ((getattr(pipe, "unet", None) or pipe.transformer, 3), (pipe.vae.decoder, 0)):
        target = module.conv_in if hasattr(module, "conv_in") else module.pos_embed
        forward = target.forward

        def failing(x: torch.Tensor, *args: Any, limit: int = limit, forward: Any = forward, **kwargs: Any) -> Any:
            if x.shape[0] > limit > 0 or (limit == 0 and x.shape[-2] > 40):
                fallen.append(x.shape)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(x, *args, **kwargs)

        monkeypatch.setattr(target, "forward", failing)
    again = drawn(pipe, 112, 160)
    assert len(fallen) >= 2 and made.retries >= 1
    assert np.abs(again - plain).max() <= 1e-4


@pytest.mark.parametrize("kind", [StableDiffusionXLImg2ImgPipeline, StableDiffusionImg2ImgPipeline])
def test_from_a_picture_with_the_posteriors_own_noise(kind: type) -> None:
    """Encoding gives mean and variance, so that img2img draws the same sample."""
    make = sdxl if "XL" in kind.__name__ else sd15
    pipe = make(kind)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, NATIVE, NATIVE, generator=torch.Generator().manual_seed(8))

    def call() -> np.ndarray:
        found: np.ndarray = pipe(
            image=image,
            strength=0.7,
            num_inference_steps=4,
            output_type="np",
            generator=torch.Generator().manual_seed(2),
            **texts(pipe),
        ).images[0]
        return found

    plain = call()
    hires.attach(pipe, vram="2GB")
    assert np.abs(call() - plain).max() <= 1e-4
    hires.detach(pipe)
    assert np.array_equal(call(), plain)


def test_inpainting_unets_see_the_mask_of_their_tile() -> None:
    pipe = sd15(StableDiffusionInpaintPipeline, channels=9)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 128, 96, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(1, 1, 128, 96)
    mask[..., 40:] = 1
    hires.attach(pipe, vram="2GB")
    found = pipe(
        image=image, mask_image=mask, height=128, width=96, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(2), **texts(pipe),
    ).images[0]  # fmt: skip
    assert found.shape == (128, 96, 3) and np.isfinite(found).all()


def test_attention_goes_through_the_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr("hires.models.attention_processors.attention", counted)
    pipe = sdxl()
    hires.attach(pipe, vram="2GB")
    drawn(pipe)
    assert len(calls) == 3 * 2 * 4, "steps x attentions of a block x blocks"


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = sdxl()
    hires.attach(pipe, vram="2GB")
    with pytest.raises(RequestError, match="attached already"):
        hires.attach(pipe)
    with pytest.raises(RequestError, match="ControlNet"):
        pipe.unet(tokens(1, 4, 40, 28), 400, tokens(1, 7, 32), down_block_additional_residuals=(tokens(1, 4, 40, 28),))
    monkeypatch.setattr(pipe.vae, "decode", lambda z: z)
    with pytest.raises(RequestError, match="replaced after attach"):
        hires.detach(pipe)
    monkeypatch.undo()
    hires.detach(pipe)
    with pytest.raises(RequestError, match="is not attached"):
        hires.detach(pipe)
    with pytest.raises(RequestError, match=r"dict is none of StableDiffusionXL\.\.\."):
        hires.attach({})
    small = sdxl()
    small.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(RequestError, match=r"with AutoencoderTiny, is none of .* with an AutoencoderKL"):
        hires.attach(small)
    with pytest.raises(BudgetError, match="give more vram"):
        hires.attach(pipe, vram="10kB")
    for options in ({"tile_px": 0}, {"tile_px": "64"}, {"overlap_px": -4}, {"tile_px": 64, "overlap_px": 64}):
        with pytest.raises(RequestError, match="px"):
            hires.attach(pipe, vram="2GB", **options)  # type: ignore[arg-type]
    assert "_hires_attached" not in pipe.__dict__ and "forward" not in pipe.unet.__dict__


def test_processors_of_other_libraries_stay() -> None:
    class TheirOwn:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return hidden_states

    pipe = sdxl()
    name = next(iter(pipe.unet.attn_processors))
    own = TheirOwn()
    pipe.unet.set_attn_processor({key: own if key == name else value for key, value in pipe.unet.attn_processors.items()})
    made = hires.attach(pipe, vram="2GB")
    assert made.kept == (name,) and pipe.unet.attn_processors[name] is own and name in made.explain()
    hires.detach(pipe)
    assert pipe.unet.attn_processors[name] is own
