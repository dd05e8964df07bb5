"""Kinds of files that people have, each loaded as what it is or refused by its name with the next move; none in silence.

The names of the tensors are those of real files, and so are the sides that decide; other sides are small.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hires.checkpoints.families import UNetShape
from hires.checkpoints.headers import read_header
from hires.checkpoints.inspect import inspect
from hires.checkpoints.other_families import OTHER_KINDS, other_kind
from hires.checkpoints.spec import load_spec
from hires.errors import ModelError
from tests.support.headers import (
    LAYOUTS,
    Shapes,
    as_entries,
    ldm_shapes,
    narrow_unet,
    narrow_vae,
    own_shapes,
    vae_shapes,
    write_gguf,
    write_safetensors,
    write_torch,
)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L = {"text_model.embeddings.token_embedding.weight": (514, 64), "text_model.final_layer_norm.weight": (64,)}
CLIP_G = {"token_embedding.weight": (514, 64), "text_projection": (64, 64), "ln_final.weight": (64,)}


def prefixed(shapes: Shapes, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


@functools.cache
def sdxl() -> Shapes:
    """A bare SDXL UNet in latent diffusion's naming."""
    return ldm_shapes(narrow_unet())


@functools.cache
def sd15() -> Shapes:
    """SDXL's without size conditions, and text of width 64."""
    narrow = sdxl()
    return {
        name: (*shape[:1], 64, *shape[2:]) if ".attn2.to_k." in name or ".attn2.to_v." in name else shape
        for name, shape in narrow.items()
        if not name.startswith("label_emb")
    }


@functools.cache
def vae() -> Shapes:
    return vae_shapes(narrow_vae())


def whole_sdxl() -> Shapes:
    towers = prefixed(CLIP_L, "conditioner.embedders.0.transformer.") | prefixed(CLIP_G, "conditioner.embedders.1.model.")
    return prefixed(sdxl(), UNET) | prefixed(vae(), VAE) | towers


def whole_sd15() -> Shapes:
    return prefixed(sd15(), UNET) | prefixed(vae(), VAE) | prefixed(CLIP_L, "cond_stage_model.transformer.")


def with_channels(channels: int, shapes: Shapes | None = None) -> Shapes:
    given = sdxl() if shapes is None else shapes
    return prefixed(given | {"input_blocks.0.0.weight": (32, channels, 3, 3)}, UNET)


def marked(**marks: tuple[int, ...]) -> Shapes:
    return prefixed(sdxl(), UNET) | {name.replace("__", "."): shape for name, shape in marks.items()}


Write = Callable[[Path], Path]


def plain(shapes: Callable[[], Shapes], dtype: str = "F16") -> Write:
    return lambda folder: write_safetensors(folder / "a.safetensors", as_entries(shapes(), dtype))


def refused(*names: str, **sides: tuple[int, ...]) -> Write:
    """A file of these tensors, vectors but for those whose sides are given."""
    shapes = dict.fromkeys(names, (2,)) | {name.replace("__", "."): side for name, side in sides.items()}
    return lambda folder: write_safetensors(folder / "a.safetensors", as_entries(shapes))


def ckpt(shapes: Callable[[], Shapes], old: bool = False) -> Write:
    around = {"global_step": 3, "epoch": 1, "optimizer_states": [], "pytorch-lightning_version": "1.4.2"}
    return lambda folder: write_torch(folder / "a.ckpt", shapes(), around, old)


def layout(name: str) -> Write:
    return plain(lambda: prefixed(ldm_shapes(narrow_unet(**LAYOUTS[name])), UNET))


def linear_layers() -> list[str]:
    return [
        name.removesuffix(".weight") for name in whole_sdxl() if name.endswith((".attn1.to_q.weight", ".attn2.to_k.weight"))
    ]


def fp8(scale: str, by: Callable[[tuple[int, ...]], tuple[int, ...]], *markers: str) -> Write:
    """Layers in fp8 with scales."""

    def write(folder: Path) -> Path:
        shapes, layers = whole_sdxl(), linear_layers()
        entries = as_entries(shapes) | {f"{layer}.weight": ("F8_E4M3", shapes[f"{layer}.weight"]) for layer in layers}
        entries |= {f"{layer}.{scale}": ("F32", by(shapes[f"{layer}.weight"])) for layer in layers}
        return write_safetensors(folder / "a.safetensors", entries | dict.fromkeys(markers, ("F8_E4M3", (0,))))

    return write


def comfy(kind: str) -> Write:
    """ComfyUI's newer convention, the format of a layer in JSON beside it."""

    def write(folder: Path) -> Path:
        shapes, layers = whole_sdxl(), linear_layers()
        text = json.dumps({"format": kind}).encode()
        entries = as_entries(shapes) | {f"{layer}.weight": ("F8_E4M3", shapes[f"{layer}.weight"]) for layer in layers}
        for layer in layers:
            entries |= {f"{layer}.weight_scale": ("F32", ()), f"{layer}.comfy_quant": ("U8", (len(text),))}
        return write_safetensors(folder / "a.safetensors", entries, values={f"{layer}.comfy_quant": text for layer in layers})

    return write


def nf4(nested: bool) -> Write:
    def write(folder: Path) -> Path:
        shapes, layers, texts = whole_sdxl(), linear_layers(), {}
        entries = as_entries(shapes)
        for layer in layers:
            weight, shape = f"{layer}.weight", shapes[f"{layer}.weight"]
            count = shape[0] * shape[1]
            state = json.dumps(
                {"quant_type": "nf4", "blocksize": 64, "shape": shape, "nested_blocksize": 256, "nested_offset": 0.1}
            )
            texts[f"{weight}.quant_state.bitsandbytes__nf4"] = state.encode()
            entries |= {
                weight: ("U8", (count // 2, 1)),
                f"{weight}.absmax": ("U8" if nested else "F32", (count // 64,)),
                f"{weight}.quant_map": ("F32", (16,)),
                f"{weight}.quant_state.bitsandbytes__nf4": ("U8", (len(state),)),
            }
            if nested:
                entries |= {f"{weight}.nested_absmax": ("F32", (1,)), f"{weight}.nested_quant_map": ("F32", (256,))}
        return write_safetensors(folder / "a.safetensors", entries, values=texts)

    return write


def int8(folder: Path) -> Path:
    shapes, layers = whole_sdxl(), linear_layers()
    entries = as_entries(shapes)
    for layer in layers:
        shape = shapes[f"{layer}.weight"]
        entries |= {f"{layer}.weight": ("I8", shape), f"{layer}.SCB": ("F32", shape[:1]), f"{layer}.weight_format": ("U8", ())}
    return write_safetensors(folder / "a.safetensors", entries)


def gguf(shapes: Callable[[], Shapes], architecture: str = "") -> Write:
    def write(folder: Path) -> Path:
        entries = {name: ("Q8_0" if _in_blocks(shape) else "F16", shape) for name, shape in shapes().items()}
        return write_gguf(folder / "a.gguf", entries, {"general.architecture": architecture} if architecture else {})

    return write


def _in_blocks(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[-1] % 32 == 0


def with_ema() -> Shapes:
    return whole_sd15() | {"model_ema.diffusion_modelinput_blocks00weight": (2,), "model_ema.decay": ()}


LOADED: dict[str, tuple[Write, str]] = {
    "SDXL": (plain(whole_sdxl), "sdxl"),
    "SDXL in bf16": (plain(whole_sdxl, "BF16"), "sdxl"),
    "SDXL, v-prediction": (plain(lambda: whole_sdxl() | {"v_pred": (0,), "ztsnr": (0,)}), "sdxl-v"),
    "SDXL InstructPix2Pix": (plain(lambda: with_channels(8)), "sdxl-ip2p"),
    "SD1.5": (plain(whole_sd15), "sd15"),
    "SD1.5 .ckpt with state_dict and model_ema": (ckpt(with_ema), "sd15"),
    "SDXL .ckpt with state_dict": (ckpt(whole_sdxl), "sdxl"),
    "SD1.4 .ckpt of torch before 1.6": (ckpt(whole_sd15, old=True), "sd15"),
    "UNet with ComfyUI's prefix": (plain(lambda: prefixed(sdxl(), UNET)), "sdxl"),
    "UNet without a prefix": (plain(sdxl), "sdxl"),
    "UNet under diffusion_model": (plain(lambda: prefixed(sdxl(), "diffusion_model.")), "sdxl"),
    "SD1.5 UNet without a prefix": (plain(sd15), "sd15"),
    "UNet of diffusers in one file": (plain(lambda: own_shapes(narrow_unet())), "sdxl"),
    "UNet of diffusers under unet.": (plain(lambda: prefixed(own_shapes(narrow_unet()), "unet.")), "sdxl"),
    "thinner UNet of diffusers in one file": (plain(lambda: own_shapes(narrow_unet(**LAYOUTS["SSD-1B"]))), "sdxl"),
    **{name: (layout(name), "sdxl") for name in LAYOUTS},
    "fp8 plain": (plain(whole_sdxl, "F8_E5M2"), "sdxl"),
    "fp8 scaled, ComfyUI's old": (fp8("scale_weight", lambda shape: (), f"{UNET}scaled_fp8"), "sdxl"),
    "fp8 scaled, ComfyUI's new": (comfy("float8_e4m3fn"), "sdxl"),
    "fp8 scaled by row": (fp8("weight_scale", lambda shape: (shape[0], 1)), "sdxl"),
    "fp8 scaled by block": (fp8("weight_scale_inv", lambda shape: (1, 1)), "sdxl"),
    "NF4": (nf4(False), "sdxl"),
    "NF4, nested": (nf4(True), "sdxl"),
    "int8": (int8, "sdxl"),
    "GGUF of ComfyUI": (gguf(sdxl, "sdxl"), "sdxl"),
    "GGUF of stable-diffusion.cpp": (gguf(whole_sd15), "sd15"),
}
SD3_KEY = "joint_blocks.0.context_block.attn.qkv.weight"
FLUX = ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight")
ADALN = "adaln_single.emb.timestep_embedder.linear_1.bias"
REFUSED: dict[str, tuple[Write, str]] = {
    "SD3": (refused(f"{UNET}{SD3_KEY}"), "Stable Diffusion 3 "),
    "SD3 bare": (refused(SD3_KEY), "Stable Diffusion 3 "),
    "Flux": (refused(*(UNET + key for key in FLUX)), "Flux "),
    "Flux bare": (refused(*FLUX), "Flux "),
    "Flux of diffusers": (refused("single_transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"), "Flux "),
    "Flux Fill": (refused(*FLUX, img_in__weight=(2, 384)), "Flux Fill"),
    "Flux.2": (refused(*FLUX, "double_stream_modulation_img.lin.weight"), r"Flux\.2"),
    "Chroma": (refused(*FLUX, "distilled_guidance_layer.in_proj.weight"), "Chroma"),
    "AuraFlow": (refused("double_layers.0.attn.w1q.weight"), "AuraFlow"),
    "Stable Cascade": (refused("clf.1.weight", "clip_txt_mapper.weight"), "Stable Cascade"),
    "Hunyuan-DiT": (refused("mlp_t5.0.weight"), "Hunyuan-DiT"),
    "HunyuanVideo": (refused("txt_in.individual_token_refiner.blocks.0.norm1.weight"), "HunyuanVideo"),
    "Mochi": (refused("t5_yproj.weight"), "Mochi"),
    "LTX-Video": (refused(ADALN, "transformer_blocks.0.attn1.to_q.weight"), "LTX-Video"),
    "PixArt of diffusers": (refused(ADALN, "pos_embed.proj.bias"), "PixArt transformer in diffusers' naming.*give its folder"),
    "Sana": (refused("attention_y_norm.weight", "blocks.0.cross_attn.q_linear.weight", "t_block.1.weight"), "Sana"),
    "Lumina 2": (refused(cap_embedder__1__weight=(2304, 2304)), "Lumina 2"),
    "Z-Image": (refused(cap_embedder__1__weight=(3840, 2560)), "Z-Image"),
    "Wan": (refused("head.modulation", "blocks.0.cross_attn.k.weight"), "Wan"),
    "HiDream": (refused(f"{UNET}caption_projection.0.linear.weight"), "HiDream"),
    "Qwen-Image": (refused("txt_norm.weight", "img_in.weight", "transformer_blocks.0.img_mod.1.weight"), "Qwen-Image"),
    "Cosmos": (refused("net.blocks.0.mlp.layer1.weight"), "Cosmos"),
    "OmniGen 2": (refused("time_caption_embed.timestep_embedder.linear_1.bias"), "OmniGen 2"),
    "Kandinsky 5": (refused("visual_transformer_blocks.0.cross_attention.key_norm.weight"), "Kandinsky 5"),
    "SVD": (
        plain(lambda: with_channels(8) | {f"{UNET}input_blocks.8.0.time_mixer.mix_factor": (1,)}),
        "Stable Video Diffusion",
    ),
    "AnimateDiff": (
        refused("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"),
        "AnimateDiff",
    ),
    "Kolors": (plain(lambda: own_shapes(narrow_unet()) | {"encoder_hid_proj.weight": (2048, 4096)}), "Kolors"),
    "Playground 2.5": (plain(lambda: marked(edm_mean=(4,), edm_std=(4,))), r"Playground 2\.5"),
    "SDXL refiner": (plain(lambda: marked(conditioner__embedders__0__model__ln_final__weight=(2,))), "the SDXL refiner"),
    "refiner's UNet": (plain(lambda: sdxl() | {"label_emb.0.0.weight": (128, 2560)}), "the SDXL refiner"),
    "inpainting": (plain(lambda: with_channels(9)), "an inpainting model of 9 input channels.*`init` and `mask`"),
    "SD1.5 inpainting": (plain(lambda: with_channels(9, sd15())), "an inpainting model"),
    "depth model": (plain(lambda: with_channels(5, sd15())), "a depth model"),
    "SD2": (
        plain(lambda: prefixed(sd15(), UNET) | {"cond_stage_model.model.ln_final.weight": (2,)}),
        "Stable Diffusion 2",
    ),
    "ControlNet": (
        refused("control_model.zero_convs.0.0.weight", "control_model.input_blocks.0.0.weight"),
        "a ControlNet",
    ),
    "ControlNet bare": (refused("zero_convs.0.0.weight", "input_blocks.0.0.weight"), "a ControlNet"),
    "ControlNet of diffusers": (refused("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"), "a ControlNet"),
    "control-LoRA": (refused("lora_controlnet", "input_blocks.0.0.up"), "a ControlNet"),
    "IP-Adapter": (refused("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter"),
    "T2I-Adapter": (refused("adapter.body.0.resnets.0.block1.weight"), "a T2I-Adapter"),
    "ESRGAN": (refused("conv_first.weight", "body.0.rdb1.conv1.weight"), "enlarges pictures.*`hires upscale`"),
    "ESRGAN, old names": (refused("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "enlarges pictures"),
    "ESRGAN in params_ema": (refused("params_ema.conv_first.weight"), "enlarges pictures"),
    "LoRA": (refused("lora_unet_mid_block_x.lora_down.weight", "lora_unet_mid_block_x.alpha", **{
        "lora_unet_mid_block_x__lora_down__weight": (2, 2)}), "a LoRA.*`loras`"),
    "LoHa": (refused("lora_unet_x.hada_w1_a"), "a LoRA.*`loras`"),
    "textual inversion of SDXL": (refused(clip_l=(2, 768), clip_g=(2, 1280)), "a textual inversion.*embedding:NAME"),
    "textual inversion of diffusers": (refused(**{"<cat>": (1, 768)}), "a textual inversion.*embedding:NAME"),
    "Zero123": (refused("cc_projection.weight"), "CustomNet or Zero123"),
    "GLIGEN": (refused("position_net.linears.0.weight"), "GLIGEN"),
    "Kandinsky 2": (refused("add_embedding.image_norm.weight"), "Kandinsky 2"),
    "hypernetwork": (refused("768.0.linear.0.weight"), "a hypernetwork"),
    "VAE": (plain(vae), "an autoencoder alone.*`vae`"),
    "small VAE": (refused("decoder.layers.0.weight", "encoder.layers.0.weight"), r"small autoencoder \(TAESD\).*`tiny_vae`"),
    "small VAE, ComfyUI's": (refused("taesd_decoder.1.weight"), "small autoencoder.*`tiny_vae`"),
    "CLIP-L": (refused(*CLIP_L), "a text encoder alone.*text_encoder/"),
    "CLIP-G": (refused("token_embedding.weight", "ln_final.weight", "ln_final.bias"), "a text encoder alone"),
    "T5": (refused("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder alone"),
    "CLIP's picture encoder": (refused("vision_model.embeddings.class_embedding"), "a CLIP picture encoder"),
    "GGUF of Flux": (gguf(lambda: {"double_blocks.0.img_attn.qkv.weight": (64, 64)}, "flux"), r"Flux \(general\.architecture"),
    "GGUF of another architecture": (gguf(lambda: {"x.weight": (64, 64)}, "mamba"), "mamba"),
    "GGUF of T5": (gguf(lambda: {"enc.blk.0.attn_q.weight": (64, 64)}, "t5"), "T5 text encoder"),
    "nvfp4": (comfy("nvfp4"), "stored as nvfp4, which is not read; give the model in"),
    "nvfp4 without JSON": (fp8("weight_scale_2", lambda shape: ()), "stored as nvfp4"),
    "fp8 with unknown scales": (fp8("scale_of_rows", lambda shape: ()), "scale_of_rows is a scale of a convention"),
    "fp8 with scales that fit nothing": (fp8("weight_scale", lambda shape: (3,)), "is no scale of a weight"),
    "4-bit floats of torch": (lambda folder: write_safetensors(
        folder / "a.safetensors", as_entries(whole_sdxl(), "F4")), "stored as F4"),
    "nothing known": (refused("something.weight"), "no known kind of checkpoint .it holds something"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADED)
def test_a_file_is_what_it_is(kind: str, tmp_path: Path) -> None:
    write, family = LOADED[kind]
    path = write(tmp_path)
    spec = load_spec(str(path))
    assert spec.family == family
    assert spec.parts["network"].path == path
    if kind in LAYOUTS:
        assert any(kind in reason for reason in inspect(path).document["why"])
    packed = kind.startswith(("fp8", "NF4", "int8", "GGUF"))
    assert packed == any("widened to the computing type" in note for note in spec.notes)
    assert packed == ("  stored " in inspect(path).explain())
    assert isinstance(spec.network, UNetShape)
    whole = sd15() if family == "sd15" else sdxl()
    if kind not in LAYOUTS and "thinner" not in kind and "InstructPix2Pix" not in kind:
        assert spec.network_params == sum(_count(shape) for shape in whole.values())  # those of the widened weights


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_of_another_kind_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    write, words = REFUSED[kind]
    path = write(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        load_spec(str(path))
    assert str(path) in str(caught.value)
    assert "download" not in str(caught.value)  # the file is whole


def test_forty_kinds_are_listed_and_every_row_of_the_table_is_met(tmp_path: Path) -> None:
    assert len(LOADED) + len(REFUSED) >= 40
    met = set()
    for index, (write, _) in enumerate(REFUSED.values()):
        folder = tmp_path / str(index)
        folder.mkdir()
        with contextlib.suppress(ModelError):  # what its container refuses
            found = other_kind(read_header(write(folder)).shapes)
            met.add(found[0].name if found else "")
    assert {kind.name for kind in OTHER_KINDS} <= met


def test_what_a_file_lacks_is_asked_for_by_name(tmp_path: Path) -> None:
    """A UNet alone: text encoders and VAE from `parts`."""
    spec = load_spec(str(LOADED["UNet without a prefix"][0](tmp_path)))
    assert {"vae", "text_encoder", "text_encoder_2"} <= {part.component for part in spec.missing}
    assert any("to be run it needs" in note for note in spec.notes)


def test_tensors_that_are_not_used_are_named(tmp_path: Path) -> None:
    spec = load_spec(str(LOADED["SD1.5 .ckpt with state_dict and model_ema"][0](tmp_path)))
    assert any(note.startswith("model_ema") for note in spec.notes)


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.99999999999.0.op.weight",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.99999999999.norm1.weight",
        "first_stage_model.encoder.down.0.block.99999999999.conv1.weight",
        f"model.diffusion_model.input_blocks.{'9' * 5000}.0.op.weight",
    ],
)
def test_a_layer_of_a_number_that_none_has_is_refused(name: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", as_entries(whole_sdxl() | {name: (1,)}))
    with pytest.raises(ModelError, match="which no network has"):
        load_spec(str(path))
