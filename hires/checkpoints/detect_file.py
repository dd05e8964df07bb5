"""Tells what a checkpoint file is from the names and shapes of its tensors.

Imports no torch and reads no tensor.

Where keys cannot tell (PixArt's δ, DMD, YOSO) the user says so with a family's name; a word in the file's name is a
hint, and the finding says that it was used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hires.checkpoints.adapters.detect import lora_facts
from hires.checkpoints.configs import LDM_CLIP_G, LDM_NETWORK, below
from hires.checkpoints.families import FAMILIES
from hires.checkpoints.headers import Header, read_header
from hires.errors import ModelError, unknown

HINTS = {  # few-step files of SDXL and SD1.5 are told in profiles.py
    "lcm": ("pixart-delta",),
    "dmd": ("pixart-dmd",),
    "yoso": ("yoso-pixart-512",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a file or folder is."""

    path: Path
    kind: str
    """model, lora or vae."""
    family: str
    """A name of `FAMILIES`; for a LoRA what it was trained for, in words where no family fits, or '' where its keys do not
    tell.
    """
    layout: str
    """How its keys are named: ldm, pixart or diffusers."""
    why: tuple[str, ...]
    """The keys and values that decided."""
    header: Header | None = None
    prefix: str = ""
    """What the names in a wrapped .pth start with."""
    parameterisation: str | None = None
    sigma_range: tuple[float, float] | None = None
    """The least and the largest sigma that the file gives; None without."""
    betas: tuple[str, float, float] | None = None
    """The betas that the file gives; None without."""
    zero_terminal_snr: bool = False
    size_conditions: bool | None = None
    native_px: int | None = None
    context: int | None = None
    """The width of the text that a LoRA's cross-attention reads; None without."""
    control: int = 0
    """Copied blocks of a PixArt ControlNet."""
    notes: tuple[str, ...] = ()


def supported() -> str:
    """The families, for messages."""
    return f"supported: {', '.join(FAMILIES)}"


def identify_file(path: Path, family: str | None = None) -> Finding:
    """A single file of weights. `family` is what the user says it is; ModelError where the keys say otherwise."""
    header = read_header(path)
    shapes = header.shapes
    lora = identify_lora(header)
    if lora is not None:
        return lora
    if any(name.startswith(LDM_NETWORK) for name in shapes):
        return named(_ldm(header), family)
    if any(name.endswith("t_block.1.weight") for name in shapes):
        return named(_pixart(header, family), family)
    return _other(header)


def named(finding: Finding, family: str | None) -> Finding:
    """The finding as the family that the user names, or that a word in the file's name hints at."""
    base = FAMILIES[finding.family].same_keys_as or finding.family
    alike = [
        finding.family,
        *(f.name for f in FAMILIES.values() if base in (f.name, f.same_keys_as) and f.name != finding.family),
    ]
    if family is not None:
        if family not in FAMILIES:
            raise ModelError(unknown("family", family, FAMILIES))
        if family not in alike:
            others = f", or give {' or '.join(alike[1:])} if it is that" if alike[1:] else ""
            raise ModelError(
                f"family {family}: {finding.path} is {finding.family} ({'; '.join(finding.why)}); leave `family` out{others}"
            )
        return replace(finding, family=family, why=(*finding.why, f"family {family}"))
    if FAMILIES[finding.family].few_step:
        return finding
    for word, families in HINTS.items():
        hinted = [name for name in families if name in alike]
        if hinted and says(word, finding.path.name):
            note = f"{word!r} in its name: taken as {hinted[0]}, whose keys are those of {base}; else `family` {base}"
            return replace(finding, family=hinted[0], notes=(*finding.notes, note))
    return finding


def says(word: str, name: str) -> bool:
    """Whether a name holds a word: sd_xl_turbo, dreamLCM and lcm-lora do, calcmatic does not."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower()
    return re.search(rf"(?<![a-z]){word}(?![a-z])", apart) is not None


def identify_lora(header: Header) -> Finding | None:
    """What a LoRA was made for, from its keys and the width of the text it reads; None for a file that is no LoRA."""
    facts = lora_facts(header)
    if facts is None:
        return None
    return Finding(
        path=header.path,
        kind="lora",
        family=facts.family,
        layout="pixart" if facts.family == "pixart" else "ldm",
        why=facts.why,
        header=header,
        context=facts.context,
    )


def _refuse(path: Path, what: str, why: str) -> ModelError:
    return ModelError(f"{path}: {what} ({why}) is not supported; {supported()}")


def _ldm(header: Header) -> Finding:
    """A single file of the SDXL or SD1.5 layout, in the order: flags, input channels, text towers."""
    path, shapes = header.path, header.shapes
    unet = below(shapes, LDM_NETWORK)
    _refuse_other_networks(path, shapes, unet)
    channels = unet["input_blocks.0.0.weight"][1]
    context = next((shape[1] for name, shape in unet.items() if name.endswith(".attn2.to_k.weight")), 0)
    why = [f"UNet keys of latent diffusion under {LDM_NETWORK}"]
    if channels not in (4, 8):
        kind = "an inpainting model" if channels == 9 else "a UNet"
        raise _refuse(path, f"{kind} of {channels} input channels", f"{LDM_NETWORK}input_blocks.0.0.weight")
    if "label_emb.0.0.weight" not in unet:
        if context == 1024 or any(name.startswith("cond_stage_model.model.") for name in shapes):
            raise _refuse(path, "Stable Diffusion 2", f"text of width {context}")
        if channels == 8:
            raise _refuse(path, "a Stable Diffusion 1.5 of 8 input channels", "InstructPix2Pix or CustomNet")
        why.append(f"no size conditions (label_emb), text of width {context}")
        return Finding(path=path, kind="model", family="sd15", layout="ldm", why=tuple(why), header=header)
    why.append("size conditions (label_emb.0.0)")
    if any(name.startswith(LDM_CLIP_G) for name in shapes):
        why.append(f"a second text tower under {LDM_CLIP_G}")
    return _sdxl(header, channels, why)


def _sdxl(header: Header, channels: int, why: list[str]) -> Finding:
    shapes, image = header.shapes, channels == 8
    finding = Finding(path=header.path, kind="model", family="sdxl", layout="ldm", why=(), header=header)
    if image:
        why.append("8 input channels: latents of a picture to edit")
    if "edm_vpred.sigma_max" in shapes:
        highest = header.scalars.get("edm_vpred.sigma_max", math.nan)
        lowest = header.scalars.get("edm_vpred.sigma_min", 0.002)
        if not 0 < lowest < highest < math.inf:
            raise ModelError(f"{header.path}: edm_vpred.sigma_min {lowest}, sigma_max {highest} is no range; download it again")
        why.append(f"edm_vpred.sigma_max {highest:g}, sigma_min {lowest:g}")
        family = "cosxl-edit" if image else "cosxl"
        return replace(finding, family=family, why=tuple(why), sigma_range=(lowest, highest))
    if "v_pred" in shapes:
        if image:
            raise _refuse(header.path, "a v-prediction SDXL of 8 input channels", "v_pred")
        zero = "ztsnr" in shapes
        why.append("v_pred and ztsnr" if zero else "v_pred")
        return replace(finding, family="sdxl-v", why=tuple(why), zero_terminal_snr=zero)
    why.append("no edm_vpred and no v_pred: epsilon prediction")
    return replace(finding, family="sdxl-ip2p" if image else "sdxl", why=tuple(why))


def _refuse_other_networks(path: Path, shapes: Iterable[str], unet: Iterable[str]) -> None:
    """ModelError for what shares the prefix and is another model."""
    names, inner = set(shapes), set(unet)
    if {"edm_mean", "edm_std"} <= names:
        raise _refuse(path, "Playground 2.5", "edm_mean and edm_std: EDM epsilon with latents shifted by channel")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise _refuse(path, "the SDXL refiner", "its only text tower is conditioner.embedders.0.model")
    if any(name.startswith("cc_projection.") for name in names):
        raise _refuse(path, "CustomNet or Zero123", "cc_projection")
    for part, what in (("joint_blocks.", "Stable Diffusion 3"), ("double_blocks.", "Flux")):
        if any(name.startswith(part) for name in inner):
            raise _refuse(path, what, f"{LDM_NETWORK}{part}")
    if "input_blocks.0.0.weight" not in inner:
        raise ModelError(f"{path}: its UNet has no input_blocks.0.0; the file is incomplete, download it again")


def _pixart(header: Header, family: str | None) -> Finding:
    """An original PixArt .pth: tokens of y_embedding, trained grid of pos_embed, size conditions, KV compression."""
    path = header.path
    names = [name.removesuffix("t_block.1.weight") for name in header.tensors if name.endswith("t_block.1.weight")]
    prefix = min(names, key=lambda name: (name != "state_dict.", name))
    shapes = below(header.shapes, prefix)
    tokens = shapes.get("y_embedder.y_embedding", (0,))[0]
    if tokens not in (120, 300):
        raise _refuse(path, f"a PixArt of {tokens} text tokens", "y_embedder.y_embedding; α has 120, Σ 300")
    conditions = "csize_embedder.mlp.0.weight" in shapes
    why = [f"{prefix}t_block.1.weight: PixArt", f"y_embedding of {tokens} tokens: {'Σ' if tokens == 300 else 'α'}"]
    if conditions:
        why.append("csize_embedder and ar_embedder: size conditions")
    compressed = sum(name.endswith(".attn.sr.weight") for name in shapes)
    if compressed:
        why.append(f"attn.sr in {compressed} blocks: KV compression")
    control = control_blocks(header, prefix)
    if control:
        why.append(f"controlnet of {control} copied blocks beside base_model")
    group = [f for f in FAMILIES.values() if f.network == "pixart" and f.tokens == tokens]
    if "pos_embed" in shapes:
        grid = math.isqrt(shapes["pos_embed"][-2])
        why.append(f"pos_embed of {grid} x {grid} patches: {grid * 16} px")
        fitting = [facts for facts in group if facts.native_px == grid * 16]
    else:
        fitting = [facts for facts in group if facts.name == family]
    if not fitting:
        names_of = ", ".join(facts.name for facts in group)
        raise ModelError(f"{path}: PixArt of a size that is not known ({'; '.join(why)}); give `family`, one of {names_of}")
    base = fitting[0].same_keys_as or fitting[0].name
    return Finding(
        path=path,
        kind="model",
        family=base,
        layout="pixart",
        why=tuple(why),
        header=header,
        prefix=prefix,
        size_conditions=conditions,
        control=control,
    )


def control_blocks(header: Header, prefix: str) -> int:
    """How many copied blocks a PixArt ControlNet has beside the base model that is under `prefix`."""
    beside = prefix.removesuffix("base_model.") + "controlnet."
    return len({name.removeprefix(beside).split(".")[0] for name in header.tensors if name.startswith(beside)})


def _other(header: Header) -> Finding:
    """An autoencoder alone; ModelError for anything else, by name where it has one."""
    path, names = header.path, set(header.tensors)
    if any(name.startswith(("encoder.down.", "encoder.down_blocks.", "first_stage_model.")) for name in names):
        return Finding(path=path, kind="vae", family="", layout="ldm", why=("encoder keys of an AutoencoderKL",), header=header)
    if any(name.startswith(("encoder.layers.", "decoder.layers.")) for name in names):
        return Finding(path=path, kind="vae", family="", layout="diffusers", why=("keys of an AutoencoderTiny",), header=header)
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in names):
        raise ModelError(
            f"{path}: a network in diffusers' naming; give its folder, which holds the config.json that says its kind"
        )
    few = ", ".join(sorted(names)[:3]) or "no tensors"
    raise ModelError(f"{path}: no known kind of checkpoint (it holds {few}); {supported()}")
