"""Names the models and add-ons that hires does not run, from the keys of their files, with the next move.

One table, read from the top: what shares keys with a later row stands before it. Keys as the loaders of ComfyUI, diffusers and
stable-diffusion.cpp test them. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

WRAPPERS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "state_dict.",
    "params_ema.",
    "params.",
    "module.",
    "transformer.",
    "control_model.",
    "model.",
    "net.",
)
"""What names of a file may begin with and say nothing."""
ELSEWHERE = "run it in the program that it was made for; hires runs SDXL, CosXL, Stable Diffusion 1.5 and PixArt"
UPSCALER = "an upscaler: give it to `hires upscale` as `upscaler`"
IN_PROMPT = "name it in the prompt as embedding:NAME, and give the checkpoint with `model`"
AS_LORA = "give it with `loras` beside a `model`"
AS_PART = (
    "put it with its config.json into text_encoder/ of a folder, give the folder with `parts` and the checkpoint with `model`"
)


class Keys:
    """The names and shapes of a file, without what wraps them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.whole = frozenset(shapes)
        self.shapes = {bare(name): shape for name, shape in shapes.items()}

    def side(self, name: str, axis: int) -> int:
        """A side of a tensor, 0 where there is no such tensor or axis."""
        shape = self.shapes.get(name, ())
        return shape[axis] if axis < len(shape) else 0


def bare(name: str) -> str:
    """A name without its wrappers."""
    wrapper = next((word for word in WRAPPERS if name.startswith(word)), None)
    return name if wrapper is None else bare(name.removeprefix(wrapper))


Test = Callable[[Keys], str]
"""Gives the key that decides, or ''."""


@dataclass(frozen=True, slots=True)
class OtherKind:
    """One row: a kind of file that is refused."""

    name: str
    """For people, with an article where it is no proper name."""
    test: Test
    move: str = ELSEWHERE
    """What to do instead."""


def every(*names: str) -> Test:
    """All of these tensors, by their whole names."""
    return lambda keys: names[0] if all(name in keys.shapes for name in names) else ""


def either(*tests: Test) -> Test:
    """One of several tests."""
    return lambda keys: next((key for test in tests if (key := test(keys))), "")


def begins(*starts: str) -> Test:
    """Any tensor whose name begins so."""
    return lambda keys: min((name for name in keys.shapes if name.startswith(starts)), default="")


def holds(*parts: str) -> Test:
    """Any tensor whose name has one of these in it."""
    return lambda keys: min((name for name in keys.shapes if any(part in name for part in parts)), default="")


def wrapped(*starts: str) -> Test:
    """Any tensor whose name, wrappers included, begins so."""
    return lambda keys: min((name for name in keys.whole if name.startswith(starts)), default="")


def sized(name: str, axis: int, *sides: int) -> Test:
    """A tensor with one of these sides."""
    return lambda keys: f"{name} of {keys.side(name, axis)}" if keys.side(name, axis) in sides else ""


def both(first: Test, second: Test) -> Test:
    """Two tests; the first one's key decides."""
    return lambda keys: first(keys) if second(keys) else ""


def lacks(test: Test) -> Test:
    """That a test finds nothing."""
    return lambda keys: "" if test(keys) else "none"


def _only(*names: str) -> Test:
    """A file of these tensors and no others."""
    return lambda keys: names[0] if keys.whole and keys.whole <= set(names) and names[0] in keys.whole else ""


def _one_embedding(keys: Keys) -> str:
    """A single tensor of vectors as wide as CLIP's tokens."""
    if len(keys.whole) != 1:
        return ""
    (name,) = keys.whole
    (shape,) = keys.shapes.values()
    return name if 1 <= len(shape) <= 2 and shape[-1] in (768, 1024, 1280) and not name.endswith((".weight", ".bias")) else ""


IMG_IN = "img_in.weight"
FLUX = either(
    every("double_blocks.0.img_attn.norm.key_norm.scale", IMG_IN),
    every("double_blocks.0.img_attn.norm.key_norm.weight", IMG_IN),
)
FLUX2 = either(begins("double_stream_modulation_img."), every("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"))
HUNYUAN_VIDEO = either(begins("txt_in.individual_token_refiner."), begins("context_embedder.token_refiner."))
PIXART_OF_DIFFUSERS = "adaln_single.emb.timestep_embedder.linear_1.bias"
UNET = either(every("input_blocks.0.0.weight"), every("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"))
TEXT_INVERSION = either(
    wrapped("string_to_param"), _only("clip_l", "clip_g"), _only("clip_g", "clip_l"), _only("emb_params"), _one_embedding
)
OTHER_KINDS = (
    OtherKind("a textual inversion", TEXT_INVERSION, IN_PROMPT),
    OtherKind(
        "a LoHa, LoKr, OFT or full-difference adapter",
        holds(".hada_w1_a", ".lokr_w", ".oft_blocks", ".oft_diag", ".boft_", ".diff_b", ".b_norm"),
        AS_LORA,
    ),
    OtherKind("an IP-Adapter", either(wrapped("ip_adapter."), holds(".to_k_ip.")), "leave it out: it needs a picture encoder"),
    OtherKind(
        "a ControlNet for a UNet",
        either(
            holds("zero_convs.0.0.", "input_hint_block.0.", "controlnet_cond_embedding.conv_in."),
            wrapped("lora_controlnet", "control_model."),
        ),
        "ControlNets of PixArt run with `control`; others do not yet. Give the checkpoint itself with `model`",
    ),
    OtherKind(
        "a T2I-Adapter",
        either(every("body.0.block1.weight"), begins("adapter.body.0.")),
        "leave it out, and give the checkpoint itself with `model`",
    ),
    OtherKind(
        "a network that enlarges pictures (ESRGAN and its kind)",
        either(
            every("conv_first.weight"),
            holds(".RDB1.conv1.", "body.0.rdb1.conv1."),
            both(every("body.0.weight", "body.1.weight"), sized("body.0.weight", 1, 3)),
        ),
        UPSCALER,
    ),
    OtherKind("AnimateDiff's motion modules", holds("motion_modules."), ELSEWHERE),
    OtherKind(
        "Stable Video Diffusion", holds(".time_mixer.", ".time_stack.", "temporal_transformer_blocks", "temporal_res_block")
    ),
    OtherKind(
        "Kolors",
        either(
            begins("encoder_hid_proj."),
            sized("label_emb.0.0.weight", 1, 5632),
            sized("add_embedding.linear_1.weight", 1, 5632),
        ),
    ),
    OtherKind("Sana", either(every("attention_y_norm.weight"), every("caption_norm.weight"))),
    OtherKind(
        "Stable Diffusion 3",
        either(
            every("joint_blocks.0.context_block.attn.qkv.weight"),
            begins("joint_blocks."),
            every("pos_embed.proj.weight", "context_embedder.weight"),
        ),
    ),
    OtherKind("AuraFlow", either(every("double_layers.0.attn.w1q.weight"), begins("joint_transformer_blocks."))),
    OtherKind("Stable Cascade", either(every("clf.1.weight"), begins("clip_txt_mapper.", "clip_txt_pooled_mapper."))),
    OtherKind("Hunyuan-DiT", begins("mlp_t5.0.")),
    OtherKind("HunyuanVideo", HUNYUAN_VIDEO),
    OtherKind("Flux.2", FLUX2),
    OtherKind("Chroma", begins("distilled_guidance_layer.")),
    OtherKind("Flux Fill", both(FLUX, sized(IMG_IN, 1, 384))),
    OtherKind("Flux", either(FLUX, begins("double_blocks.", "single_blocks.", "single_transformer_blocks."))),
    OtherKind("Mochi", begins("t5_yproj.")),
    OtherKind(
        "LTX-Video",
        either(begins("patchify_proj."), both(every(PIXART_OF_DIFFUSERS), lacks(every("pos_embed.proj.bias")))),
    ),
    OtherKind(
        "a PixArt transformer in diffusers' naming",
        every(PIXART_OF_DIFFUSERS),
        "give its folder, which holds the config.json that says its size",
    ),
    OtherKind("Z-Image", either(sized("cap_embedder.1.weight", 0, 3840), begins("all_x_embedder."))),
    OtherKind("Lumina 2", either(begins("cap_embedder.1."), begins("time_caption_embed.timestep_embedder.linear_0"))),
    OtherKind("Wan", either(every("head.modulation"), begins("condition_embedder.time_embedder."))),
    OtherKind("HiDream", begins("caption_projection.0.linear.")),
    OtherKind("Qwen-Image", either(every("txt_norm.weight", IMG_IN), every("transformer_blocks.0.img_mod.1.weight"))),
    OtherKind(
        "Cosmos",
        either(every("blocks.0.mlp.layer1.weight"), begins("blocks.block0.blocks."), every("x_embedder.proj.1.weight")),
    ),
    OtherKind("OmniGen 2", begins("time_caption_embed.")),
    OtherKind("Kandinsky 5", begins("visual_transformer_blocks.")),
    OtherKind("Kandinsky 2", begins("add_embedding.image_norm.", "encoder_hid_proj.image_embeds.")),
    OtherKind("Playground 2.5", every("edm_mean", "edm_std"), "its EDM epsilon is not supported; give an SDXL checkpoint"),
    OtherKind(
        "the SDXL refiner",
        either(wrapped("conditioner.embedders.0.model."), sized("label_emb.0.0.weight", 1, 2560)),
        "give the SDXL base; the relay refines larger stages with it",
    ),
    OtherKind("CustomNet or Zero123", begins("cc_projection.")),
    OtherKind("GLIGEN", begins("position_net.")),
    OtherKind(
        "a hypernetwork", wrapped("768.0.linear.", "320.0.linear."), "leave it out, and give the checkpoint with `model`"
    ),
    OtherKind(
        "a CLIP picture encoder", both(begins("vision_model.embeddings."), lacks(UNET)), "give the checkpoint with `model`"
    ),
    OtherKind(
        "a text encoder alone",
        both(
            either(
                begins("text_model.embeddings.", "embeddings.token_embedding.", "enc.blk.0.", "encoder.block.0.layer.0."),
                every("token_embedding.weight", "ln_final.weight"),
                every("token_embedding.weight", "resblocks.0.ln_1.weight"),
                begins("token_embd."),
            ),
            lacks(UNET),
        ),
        AS_PART,
    ),
)
"""The kinds, the first that fits decides."""


def other_kind(shapes: Mapping[str, tuple[int, ...]]) -> tuple[OtherKind, str] | None:
    """The kind of a file that hires does not run, and the key that decided; None for a file of no such kind."""
    keys = Keys(shapes)
    return next(((kind, key) for kind in OTHER_KINDS if (key := kind.test(keys))), None)
